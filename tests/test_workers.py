"""Worker processes: what goes wrong in them arrives, and none is left behind.

python test_workers.py HOW    a run in a process of its own, for the tests of how processes end
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import fedprior as fp
from cases import classification_clients, equal, without_seconds
from fedprior import inference, posteriors, priors, tree
from fedprior.core import Client, Eta, Prior
from fedprior.data.population import LazyPopulation
from fedprior.engines import Auto, Sequential, WorkerError, Workers, auto, costs, mailbox, workers
from fedprior.engines.sequential import torch_threads
from fedprior.objective import Objective
from fedprior.round import RoundWork, Upload
from fedprior.store import MemoryStore

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are looked up in /proc"),
    pytest.mark.timeout(60),
]
CLIENTS = classification_clients((6, 5, 9, 4, 7, 8))
MODEL = fp.models.mlp(4, (6,), 3)


def population(act: Callable[[int], None]) -> LazyPopulation:
    """The clients, after something has happened where they are asked for: before round one only client 0 is."""

    def make(index: int) -> Client:
        act(index)
        return CLIENTS[index]

    return LazyPopulation(len(CLIENTS), make)


def run(clients: Any = CLIENTS, engine: Any = None, **fields: Any) -> fp.Result:
    fields = {"algorithm": fp.fedavg(0.1, batch_size=4), "model": MODEL, "rounds": 3, "cohort": 5} | fields
    return fp.run(clients=clients, engine=engine or Workers(2), **fields)


def children(of: int | None = None) -> set[int]:
    """The living processes whose parent is `of`, by default this one; those that wait to be reaped do not live."""
    found, of = set(), of or os.getpid()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if int(parent) == of and state != "Z":
            found.add(int(stat.parent.name))
    return found


@contextmanager
def nobody_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


class OwnError(Exception):
    """An exception with a field."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code


class OneWay(Exception):
    """Its copies cannot be made: the constructor wants what is not in args."""

    def __init__(self, *, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class Locked(Exception):
    """It holds what no process can send."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.pipe = sys.stdout


def broken_reader(error: Exception) -> None:
    raise error


@dataclass(frozen=True)
class Failing:
    """Point, and an exception for one client."""

    point: inference.Point
    error: Exception
    where: int

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        return self.point.start(prior, eta)

    def e_step(self, objective: Objective, prior: Prior, eta: Eta, client: Client, state: Any, rng: Any) -> Any:
        if client.index == self.where:
            broken_reader(self.error)
        return self.point.e_step(objective, prior, eta, client, state, rng)


def failing(error: Exception, where: int = 3) -> fp.Algorithm:
    return fp.Algorithm(priors.Gaussian(), Failing(inference.Point(0.1), error, where))


ERRORS = {
    "own": (OwnError(7, "torn"), OwnError, "torn"),
    "with-a-note": (KeyError("speaker"), KeyError, "speaker"),
    "one-way": (OneWay(reason="no such disk"), RuntimeError, "OneWay: no such disk"),
    "locked": (Locked("a file"), RuntimeError, "Locked: a file"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_exception_arrives_as_it_is(name: str) -> None:
    """Its type and fields, the client, the round, and the traceback of the worker."""
    error, kind, text = ERRORS[name]
    with nobody_left(), pytest.raises(kind) as caught:
        run(algorithm=failing(error), cohort=6)
    assert type(caught.value) is kind and text in str(caught.value)
    if isinstance(caught.value, OwnError):
        assert caught.value.code == 7
    assert "in round 1, client 'client-3' (index 3), seed 0" in "".join(caught.value.__notes__)
    assert "in broken_reader" in str(caught.value.__cause__)


def test_the_same_engine_goes_on_after_an_exception() -> None:
    engine = Workers(2)
    with pytest.raises(OwnError):
        run(algorithm=failing(OwnError(7, "torn")), cohort=6, engine=engine)
    assert equal(run(engine=engine).params, run(engine=Sequential(1)).params)


def test_a_torn_state_is_told_as_by_the_loop(tmp_path: Path) -> None:
    """The states are the parent's to read: its exception is the client's, with the client's notes."""
    algorithm = fp.topk(0.1, 0.2)
    run(algorithm=algorithm, out=tmp_path, rounds=1, cohort=6)
    torn = next((tmp_path / "clients").glob("client-4.*"))
    torn.write_bytes(torn.read_bytes()[:10])
    for engine in (Workers(2), Sequential(1)):
        with nobody_left(), pytest.raises(ValueError, match="client 4") as caught:
            run(algorithm=algorithm, out=tmp_path, rounds=2, cohort=6, resume=True, engine=engine)
        assert "in round 2, client 'client-4'" in "".join(caught.value.__notes__)


def kill_self(index: int, parent: int, flag: Path) -> None:
    """SIGKILL for the worker that first comes to client 2 after the flag was put up."""
    if index == 2 and os.getpid() != parent and flag.exists():
        flag.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told_at_once_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    flag, out, parent = tmp_path / "kill", tmp_path / "run", os.getpid()
    clients = population(lambda index: kill_self(index, parent, flag))
    fields = {"algorithm": fp.topk(0.1, 0.2), "cohort": 6, "rounds": 5}

    def kill_in_round_three(record: fp.Round) -> None:
        if record.number == 2:
            flag.touch()

    with nobody_left(), pytest.raises(WorkerError, match=r"client 2 .exit code -9.*Resume"):
        run(clients, out=out, on_round=kill_in_round_three, **fields)
    resumed = run(clients, out=out, resume=True, **fields)
    whole = run(engine=Sequential(1), **fields)
    assert equal(tree.flatten(resumed.eta), tree.flatten(whole.eta))
    assert without_seconds(resumed.history) == without_seconds(whole.history)


def test_a_worker_killed_between_rounds_is_told() -> None:
    def kill_one(record: fp.Round) -> None:
        victim = min(children() - before)
        os.kill(victim, signal.SIGKILL)
        while alive(victim):
            time.sleep(0.001)

    before = children()
    with nobody_left(), pytest.raises(WorkerError, match="between two clients"):
        run(on_round=kill_one)


def test_an_engine_runs_one_model_after_the_other_and_one_within_the_other() -> None:
    """No fork of an earlier run answers, though nobody has closed the engine in between."""
    engine = Workers(2)
    other = {"model": fp.models.mlp(4, (3,), 3), "clients": CLIENTS[:4], "cohort": 3, "seed": 1}
    inner: list[fp.Result] = []
    with nobody_left():
        outer = run(engine=engine, on_round=lambda _: inner.append(run(engine=engine, **other)))
        again = run(engine=engine, **other)
    want, want_inner = run(engine=Sequential(1)), run(engine=Sequential(1), **other)
    assert equal(outer.params, want.params) and len(inner) == 3
    assert all(equal(result.params, want_inner.params) for result in [*inner, again])


def test_a_round_that_was_given_up_does_not_disturb_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its generator may be cleared away at any time later: in the middle of another run's round, say."""
    engine, given_up = Workers(2), []
    receive = RoundWork.receive

    def full(self: RoundWork, upload: Upload) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(RoundWork, "receive", full)
    with nobody_left():
        try:
            run(engine=engine)
        except OSError as error:
            given_up.append(error)  # and with it its traceback, and the frames in it
        assert given_up

        def forget(self: RoundWork, upload: Upload) -> Any:
            given_up.clear()
            return receive(self, upload)

        monkeypatch.setattr(RoundWork, "receive", forget)
        got = run(engine=engine)
    monkeypatch.setattr(RoundWork, "receive", receive)
    assert equal(got.params, run(engine=Sequential(1)).params)


@dataclass(frozen=True)
class Heavy:
    """Point, and a personal state of some megabytes that counts rounds."""

    point: inference.Point
    size: int = 1_000_000

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        return self.point.start(prior, eta)

    def e_step(self, objective: Objective, prior: Prior, eta: Eta, client: Client, state: Any, rng: Any) -> Any:
        q, _ = self.point.e_step(objective, prior, eta, client, None, rng)
        counted = torch.zeros(self.size) if state is None else state["counted"] + 1
        return posteriors.Point({k: v + 1e-3 * counted.mean() for k, v in q.phi.items()}), {"counted": counted}


def test_megabytes_in_every_direction() -> None:
    """More than any pipe's buffer: broadcast and upload of 4 MB, states of 4 MB, all workers at once."""
    algorithm = fp.Algorithm(priors.Gaussian(), Heavy(inference.Point(0.1)))
    fields = {"algorithm": algorithm, "model": fp.models.mlp(4, (1000, 1000), 3), "rounds": 2, "cohort": 6}
    got, want = run(engine=Workers(3), **fields), run(engine=Sequential(1), **fields)
    assert equal(got.params, want.params)
    assert min(c.bytes_up for r in got.history for c in r.clients) > 4_000_000


@pytest.mark.parametrize("cohort", [1, 2, 6])
def test_more_workers_than_clients(cohort: int) -> None:
    with nobody_left():
        got = run(engine=Workers(7), cohort=cohort)
    assert equal(got.params, run(engine=Sequential(1), cohort=cohort).params)


@pytest.mark.parametrize("engine", [Workers, Auto])
def test_a_parent_with_threads_of_its_own(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP's threads do not survive a fork: a worker that waited for them would hang."""
    monkeypatch.setattr(auto, "WORTH", 0.0)
    big = torch.ones(2_000, 2_000)
    model = fp.models.mlp(4, (400, 400), 3)  # large enough for PyTorch to share out, if it may
    clients = classification_clients((600, 500, 400, 300))
    fields = {"clients": clients, "model": model, "cohort": 4, "algorithm": fp.fedavg(0.1, batch_size=None)}
    want = run(engine=Sequential(1), **fields)
    with torch_threads(4):
        assert float((big @ big).sum()) == 2_000**3 and float(big.exp().sum()) > 0  # matrix product, and OpenMP's own
        assert threads() > 1
        got = run(engine=engine(), **fields)
        assert torch.get_num_threads() == 4
    assert equal(got.params, want.params)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_worker_has_one_thread_and_ignores_ctrl_c() -> None:
    """Its files of pipes are its own: the end of one worker's pipe is held by nobody else."""
    engine, seen = Workers(3), []

    def look(record: fp.Round) -> None:
        for pid in children() - before:
            status = Path(f"/proc/{pid}/status").read_text()
            ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
            seen.append((len(list(Path(f"/proc/{pid}/task").iterdir())), bool(ignored >> (signal.SIGINT - 1) & 1)))

    before = children()
    run(engine=engine, on_round=look)
    assert seen == [(1, True)] * 9


@dataclass
class Told:
    """A work whose clients take the seconds that it is told; those of no seconds have dropped out."""

    seconds: dict[int, float]
    store: MemoryStore = field(default_factory=MemoryStore)

    def client(self, index: int) -> Upload:
        taken = self.seconds.get(index, 0.0)
        time.sleep(taken)
        return Upload(index, "", 1, "ok" if taken else "dropped", 0, seconds=taken)

    def receive(self, upload: Upload) -> None:
        return None

    def changes(self) -> None:
        return None

    def changed(self, changes: None) -> Told:
        return self


def chosen(*rounds: dict[int, float]) -> list[str]:
    """The first word of what Auto has chosen after each round of eight clients."""
    engine, store, words = Auto(), MemoryStore(), []
    for seconds in rounds:
        engine.map_sum(Told(seconds, store), range(8))
        words.append(engine.choice.split(",")[0].split(":")[0])
    engine.close()
    return words


SLOW, QUICK, NOBODY = dict.fromkeys(range(8), 0.01), dict.fromkeys(range(8), 1e-5), {}
CHOICES = {
    "slow": ([SLOW], ["workers"]),
    "quick": ([QUICK, QUICK], ["loop", "loop"]),
    "nobody-answers": ([NOBODY, SLOW], ["", "workers"]),
    "the-first-drop-out": ([{3: 0.01, 5: 0.01, 6: 0.01}], ["workers"]),
    "one-answers": ([{3: 0.01}, SLOW], ["", "workers"]),
    "the-first-are-small": ([QUICK | {7: 0.1}, SLOW], ["workers", "workers"]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_auto_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "cores", lambda: 2)
    monkeypatch.setattr(auto, "worth", lambda work, cohort: (0, ""))  # nothing to stack
    monkeypatch.setattr(auto, "WORTH", 0.02)  # seconds of a round
    rounds, words = CHOICES[name]
    assert chosen(*rounds) == words


def test_windows_lose_nobody_and_bound_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 2: however slow the first client, no more than two windows wait to be received behind it."""
    monkeypatch.setattr(workers, "WINDOW", 1)
    engine, started, order = Workers(2), list[int](), [5, 3, *range(10, 25)]
    start = workers._Worker.start

    def counted(self: Any, index: int, stored: bool) -> None:
        started.append(index)
        start(self, index, stored)

    monkeypatch.setattr(workers._Worker, "start", counted)
    with nobody_left():
        received = 0
        for received, upload in enumerate(engine.uploads(Told({5: 0.2}), order), start=1):
            assert upload.index == order[received - 1]
            assert len(started) - (received - 1) <= 2 * 2
        engine.close()
    assert received == len(order) and sorted(started) == sorted(order)
    assert len(engine.costs.seconds) == len(order)


@pytest.mark.parametrize("size", [10, 11, 99, 100, 101, 300])
def test_a_message_arrives_whole_by_the_box_or_the_pipe(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "LONG", 10)
    monkeypatch.setattr(mailbox, "SIZE", 100)
    here, there = multiprocessing.Pipe()
    box, message = mailbox.Mailbox(), bytes(range(1, 251)) * 2
    box.send(here, message[:size])
    assert box.receive(there) == message[:size]


def test_costs_put_the_dearest_first_and_forget_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MOST", 3)
    seen = costs.Costs()
    for index, seconds in [(7, 1.0), (4, 3.0), (9, 2.0), (7, 5.0), (2, 4.0)]:  # 7 is seen again, so 4 is the oldest
        seen.saw(index, seconds)
    assert seen.seconds == {9: 2.0, 7: 5.0, 2: 4.0}
    assert seen.longest_first([9, 4, 2, 7, 8]) == [4, 8, 7, 2, 9]


def endless(how: str) -> None:
    """Rounds until somebody ends it; tells the processes of its workers after the first."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def told(record: fp.Round) -> None:
        if record.number == 2:
            print(*sorted(children()), flush=True)
            if how == "exception":
                raise OwnError(1, "from on_round")

    run(rounds=5 if how == "end" else 10**6, engine=Workers(3), on_round=told, cohort=6)


ENDS = {"end": (None, 0), "exception": (None, 1)} | {
    name.lower(): (getattr(signal, name), None) for name in ("SIGKILL", "SIGINT", "SIGTERM")
}


@pytest.mark.parametrize("how", ENDS)
def test_no_worker_outlives_its_parent(how: str) -> None:
    """However the parent ends."""
    with_signal, code = ENDS[how]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, how]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 3
        if with_signal is not None:
            assert all(Path(f"/proc/{pid}").exists() for pid in workers)
            time.sleep(0.05)  # somewhere in a round
            parent.send_signal(with_signal)
        _, errors = parent.communicate(timeout=30)
    if code is not None:
        assert parent.returncode == code, errors
    assert "KeyboardInterrupt" in errors if how == "sigint" else True
    gone = time.monotonic() + 10
    while (left := [pid for pid in workers if alive(pid)]) and time.monotonic() < gone:
        time.sleep(0.02)
    assert left == []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_processes_of_a_round_can_be_counted() -> None:
    """`children` sees the workers: otherwise the tests above could not fail."""
    seen: list[int] = []
    before = children()
    run(engine=Workers(3), on_round=lambda _: seen.append(len(children() - before)))
    assert seen == [3, 3, 3]


def test_counts() -> None:
    with pytest.raises(ValueError, match="count must be at least 1"):
        Workers(0)
    assert pickle.loads(pickle.dumps(Workers(2))).count == 2


if __name__ == "__main__":
    endless(sys.argv[1])
