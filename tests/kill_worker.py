"""Run by test_kill.py in a process of its own: runs that are killed, over and over, until they are done.

It imports the library once and forks: each child is killed with SIGKILL and leaves what it had written.

    python kill_worker.py FOLDER random SEED      children are killed after random times
    python kill_worker.py FOLDER points           children kill themselves after their n-th file operation
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # optimisers import it on their first use: once here, not in each child

import fedprior as fp
from cases import classification_clients, without_seconds
from fedprior import checkpoint, inference, priors, server, store, tree
from stateful import Counting

ROUNDS, POINT_ROUNDS, CLIENTS = 10, 2, 5


def run(out: Path, rounds: int) -> None:
    """A run with everything that a crash could tear: a server state, personal states, records, checkpoints."""
    e_step = Counting(inference.Point(0.05, 3, 3))
    algorithm = fp.Algorithm(priors.Gaussian(0.1), e_step, server.Adam(0.05), weighting="examples", name="killed")
    clients = classification_clients(range(8, 8 + CLIENTS))
    model = fp.models.mlp(4, (5,), 3)
    every = 1 if rounds < ROUNDS else 2
    result = fp.run(
        algorithm,
        model,
        clients,
        rounds=rounds,
        cohort=2,
        out=out,
        resume=True,
        checkpoint_every=every,
        test=clients[0].train,
    )
    counts = [store.DiskStore(out / "clients").load(i) for i in range(CLIENTS)]
    done = {
        "eta": {k: v.double().flatten().tolist() for k, v in tree.flatten(result.eta).items()},
        "history": [r.to_json() for r in without_seconds(result.history)],
        "counts": [0 if state is None else int(state["e_step/rounds"]) for state in counts],
    }
    (out / "done.json").write_text(json.dumps(done))


def child(function: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        code = 1
        try:
            function()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def wait(pid: int) -> bool:
    """True if the child was killed, False if it finished; anything else is an error."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status) != 0:
        sys.exit(1)
    return False


def at_random_times(out: Path, seed: int) -> dict[str, object]:
    """Kill, resume, kill, resume: later attempts live longer, so that it ends."""
    rng, kills, finished = random.Random(seed), 0, set()
    while True:
        pid = child(lambda: run(out, ROUNDS))
        time.sleep(rng.uniform(0.01, 0.05 + 0.02 * kills))
        os.kill(pid, signal.SIGKILL)
        if not wait(pid):
            return {"kills": kills, "reached": sorted(finished)}
        kills += 1
        saved = checkpoint.read(out) if out.exists() else None
        finished.add(saved.number if saved else 0)
        if (out / "done.json").exists() and saved and saved.number == ROUNDS:
            return {"kills": kills, "reached": sorted(finished)}


def die_at(point: int) -> None:
    """Kill this process after its n-th operation that changes files."""
    seen, opened = 0, Path.open

    def step() -> None:
        nonlocal seen
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("mkdir", "open", "replace", "unlink"):
        original = getattr(Path, name)

        def patched(self: Path, *args, original=original, **fields):
            result = original(self, *args, **fields)
            if original is not opened or "r" not in fields.get("mode", (*args, "r")[0]):
                step()  # a file opened for writing is empty here, or not yet appended to
            return result

        setattr(Path, name, patched)


def at_every_point(out: Path) -> dict[str, object]:
    """One run for each file operation: killed there, then resumed to its end."""
    point = 0
    while True:
        point += 1
        folder = out / f"point-{point}"

        def first(point: int = point, folder: Path = folder) -> None:
            die_at(point)
            run(folder, POINT_ROUNDS)

        if not wait(child(first)):
            return {"points": point}
        if wait(child(lambda folder=folder: run(folder, POINT_ROUNDS))):
            sys.exit(1)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    told = at_random_times(target, int(sys.argv[3])) if sys.argv[2] == "random" else at_every_point(target)
    print(json.dumps(told))
