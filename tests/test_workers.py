"""Worker processes: what goes wrong in them arrives, and none is left behind.

python test_workers.py HOW    a run in a process of its own, for the tests of how processes end
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedprior as fp
from cases import equal, without_seconds
from fedprior import inference, posteriors, priors, tree
from fedprior.core import Client, Eta, Prior
from fedprior.data.population import LazyPopulation
from fedprior.engines import Sequential, WorkerError, Workers
from fedprior.objective import Objective
from worker_calls import CLIENTS, MARKS, alive, children, nobody_left, run

pytestmark = MARKS


def population(act: Callable[[int], None]) -> LazyPopulation:
    """The clients, after something has happened where they are asked for: before round one only client 0 is."""

    def make(index: int) -> Client:
        act(index)
        return CLIENTS[index]

    return LazyPopulation(len(CLIENTS), make)


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


def test_the_processes_of_a_round_can_be_counted() -> None:
    """`children` sees the workers: otherwise the tests above could not fail."""
    seen: list[int] = []
    before = children()
    run(engine=Workers(3), on_round=lambda _: seen.append(len(children() - before)))
    assert seen == [3, 3, 3]


if __name__ == "__main__":
    endless(sys.argv[1])
