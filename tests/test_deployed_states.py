"""A deployed federation whose clients have states, and whose workers and SuperNodes are killed at random moments.

The law: a client's state is that of its last upload which counted, whatever its node did before and after it. So the
model, the bytes and the states are those of a simulation in which the clients that the records call lost stayed away.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

import fedprior as fp
from cases import equal, without_seconds
from fedprior import checkpoint, records, tree
from fedprior.rng import numpy_generator
from stateful import states_of_the_last_accepted

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from typer.testing import CliRunner

from deployment import NODES, Deployment, after_round, begin_run, programs, project, simulated
from fedprior.cli import app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORKER = "fedprior.federation.worker"
STATEFUL = "replace(fp.topk(lr=0.1, fraction=0.2), prior=fp.scaffold().prior, inference=fp.scaffold(lr=0.1).inference)"
KILLED = 3  # workers, one a round
DEADLINE, ROUNDS = 40, 11  # the dead SuperNode is missing for a minute, which is two rounds, and then until it joins


def kill_worker(d: Deployment, partition: int) -> None:
    """Of one node, which is in its SuperNode's process group; waited for if there is none."""
    for _ in range(600):
        for pid in programs(d, WORKER):
            if os.getpgid(pid) == d.processes[f"node-{partition}"].pid:
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.05)
    raise TimeoutError(d.log(f"node-{partition}"))


def restart(d: Deployment, name: str, partition: int) -> int:
    """A SuperNode with the key that it had; how often it was refused until Flower knew that the old one had gone."""
    for refused in range(30):
        d.node(partition, NODES, name=name)
        for _ in range(600):
            time.sleep(0.1)
            if "SuperNode ID" in d.log(name):
                return refused
            if "Exit Code" in d.log(name):
                break
        assert "[code: 2004] Failed to activate SuperNode" in d.log(name)
        d.stop(name)
        time.sleep(2)
    raise TimeoutError(d.log(name))


def test_states_and_model_are_those_of_the_uploads_that_counted(tmp_path: Path) -> None:
    """Each node's worker is killed in another round; then a whole SuperNode, which is started again with its key."""
    seed = int.from_bytes(os.urandom(4), "big")
    rng, keys = numpy_generator(seed, "kills"), tmp_path / "keys"
    CliRunner().invoke(app, ["federate", "keys", str(keys), "--nodes", str(NODES)], catch_exceptions=False)
    task = project(tmp_path / "job", STATEFUL)
    with Deployment(tmp_path, "--keys", str(keys)) as d:
        d.call("register", d.address)
        for partition in range(NODES):
            d.node(partition, NODES)
        begin_run(d, tmp_path, rounds=ROUNDS, seconds=DEADLINE)
        for number in range(KILLED):  # a message is asked twice at most: no node loses two workers
            after_round(d, tmp_path, number)
            time.sleep(rng.uniform(0, 5))
            kill_worker(d, (seed + number) % NODES)
        after_round(d, tmp_path, KILLED + 1)
        time.sleep(rng.uniform(0, 5))
        gone = int(rng.integers(NODES))
        os.killpg(d.processes[f"node-{gone}"].pid, signal.SIGKILL)
        refused = restart(d, "again", gone)
        d.processes["run"].wait(240)
        told = f"seed {seed}, partition {gone}, refused {refused} times\n{d.log('run')}"
    check(tmp_path, task, gone, told)


def check(folder: Path, task: object, gone: int, told: str) -> None:
    """The law of the module; lost is the killed SuperNode alone, and it comes back."""
    history, saved = records.read(folder / "out" / "records.jsonl"), checkpoint.read(folder / "out")
    lost = {(r.number, c.index) for r in history for c in r.lost()}
    assert {(n > KILLED, i % NODES) for n, i in lost} <= {(True, gone)}, told
    assert any(c.index % NODES == gone for r in history[-2:] for c in r.clients if c.status == "ok"), told
    want = simulated(task, lost, rounds=ROUNDS)
    assert saved is not None and equal(saved.eta, tree.flatten(want.eta)), told
    assert counted(history) == counted(want.history), told
    (states,) = (folder / "job").glob("*/client-0/..")
    states_of_the_last_accepted(states.resolve(), history, want.store)


def counted(history: list[fp.Round]) -> list[fp.Round]:
    """What the records say of the uploads that counted, and of the model; a node that is not there was sent nothing."""
    rows = [replace(r, bytes_down=0) for r in without_seconds(history)]
    return [replace(r, clients=tuple(c for c in r.clients if c.status == "ok")) for r in rows]
