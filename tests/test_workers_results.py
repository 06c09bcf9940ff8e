"""Worker processes: the loop's results, whatever is sent, however many there are, and whoever shares an engine."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fedprior as fp
from cases import classification_clients, equal
from fedprior import inference, posteriors, priors
from fedprior.core import Client, Eta, Prior
from fedprior.engines import Auto, Sequential, Workers, auto
from fedprior.engines.sequential import torch_threads
from fedprior.objective import Objective
from fedprior.round import RoundWork, Upload
from worker_calls import CLIENTS, MARKS, children, nobody_left, run

pytestmark = MARKS


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
