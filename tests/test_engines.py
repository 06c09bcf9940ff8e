"""Engines differ in speed only: the table of algorithms on each engine against the loop of one thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import classification_clients, close, equal, image_clients, pooled, redraw, without_seconds
from fedprior import Availability, engines, inference, priors, tree
from fedprior.codecs import Dense
from fedprior.core import Engine
from fedprior.engines import auto
from fedprior.objective import Objective
from stateful import Counting

ROUNDS, COHORT = 4, 4
SIZES = (6, 5, 23, 4, 7, 41, 2)  # ragged: batches of 4, with last ones of 1, 2 and 3
CLIENTS = classification_clients(SIZES)
DOUBLES = classification_clients(SIZES, dtype=torch.float64)
FLEET = Availability(dropout=0.2, deadline_seconds=0.3, slowness=0.2)


def normed() -> nn.Module:
    return redraw(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))


def dropping() -> nn.Module:
    return redraw(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)))


def frozen() -> nn.Module:
    model = fp.models.mlp(4, (6,), 3)
    next(model.parameters()).requires_grad_(False)
    return model


def conv() -> nn.Module:
    layers = [nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
    return redraw(nn.Sequential(*layers, nn.Linear(54, 8), nn.ReLU(), nn.Linear(8, 4)))


def scheduled(algorithm: fp.Algorithm) -> fp.Algorithm:
    """Units go in the first rounds."""
    return replace(algorithm, prior=replace(algorithm.prior, start=0.8, steps=2, hold=1))  # type: ignore


@dataclass(frozen=True)
class Case:
    """A run."""

    name: str
    algorithm: fp.Algorithm
    model: Callable[[], nn.Module] = lambda: fp.models.mlp(4, (40,), 3)
    clients: Any = field(default_factory=lambda: CLIENTS)

    def run(self, engine: Engine, rounds: int = ROUNDS, **fields: Any) -> fp.Result:
        test = pooled(self.clients[:2])
        fleet = {"cohort": COHORT, "availability": FLEET, "test": test, "seed": 0} | fields
        return fp.run(self.algorithm, self.model(), self.clients, rounds=rounds, engine=engine, **fleet)


FEDAVG = fp.fedavg(0.1, epochs=2, batch_size=4)
NEEDS = {
    "fedbn": {"model": normed},
    "fednsl": {"model": lambda: fp.models.rules(4, 3)},
}  # what an algorithm asks of its model
CASES = [Case(name, make(lr=0.1), **NEEDS.get(name, {})) for name, make in fp.algorithms.ALGORITHMS.items()] + [
    Case("batch-norm", FEDAVG, normed),
    Case("dropout-layers", FEDAVG, dropping),
    Case("frozen", FEDAVG, frozen),
    Case("float64", replace(FEDAVG, codec=Dense("float64")), lambda: fp.models.mlp(4, (6,), 3).double(), DOUBLES),
    Case("int8-zlib", fp.fedavg(0.1, value_type="int8", entropy="zlib")),
    Case("momentum-uniform", replace(FEDAVG, inference=inference.Point(0.1, 2, 4, momentum=0.9), weighting="uniform")),
    Case("any-optimizer", replace(FEDAVG, inference=inference.Point(0.1, optimizer=torch.optim.Adam))),
    Case(
        "personal-states", replace(FEDAVG, inference=Counting(inference.Point(0.1, 1, 4)), prior=priors.Gaussian(0.1))
    ),
    Case("feedback-int8", fp.topk(0.1, 0.2, value_type="int8")),
    Case("gates", fp.fedsparse(0.1, lambda_0=0.3, gate_lr=0.4)),
    Case("slim", scheduled(fp.fedsparse(0.1, density=0.3, epochs=2))),
    Case("slim-conv-int8", scheduled(fp.fedsparse(0.05, density=0.3, value_type="int8")), conv, image_clients(6)),
    Case("downlinks-conv", fp.feddropout(0.1), conv, image_clients(6)),
]


@dataclass(frozen=True)
class Row:
    """An engine, and how far it may be from the loop (0: not a bit), relatively."""

    name: str
    make: Callable[[], Engine]
    tolerance: float = 0.0
    worth: float = auto.WORTH


ENGINES = [
    Row("sequential", lambda: engines.Sequential(1)),
    Row("workers", lambda: engines.Workers(2)),
    Row("auto-loop", engines.Auto, worth=float("inf")),
    Row("auto-workers", engines.Auto, worth=0.0),  # a part of the first round in the loop
]


@cache
def wanted(position: int) -> fp.Result:
    return CASES[position].run(engines.Sequential(1))


def check(got: fp.Result, want: fp.Result, tolerance: float) -> None:
    """Equal eta and records; within `tolerance`, those of rounding alone may differ."""
    eta, eta_want = tree.flatten(got.eta), tree.flatten(want.eta)
    rows, rows_want = without_seconds(got.history), without_seconds(want.history)
    if tolerance == 0:
        assert equal(eta, eta_want) and rows == rows_want
        return
    assert close(eta, eta_want, tolerance)
    for a, b in zip(rows, rows_want, strict=True):
        assert a.metrics == pytest.approx(b.metrics, rel=tolerance, abs=tolerance)
        assert replace(a, metrics={}) == replace(b, metrics={})


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
@pytest.mark.parametrize("position", range(len(CASES)), ids=[c.name for c in CASES])
def test_engines_agree(position: int, engine: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "WORTH", engine.worth)
    check(CASES[position].run(engine.make()), wanted(position), engine.tolerance)


STACKED = {"fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedhb", "learnedscale"}
STACKED |= {"float64", "frozen", "momentum-uniform"}


@pytest.mark.parametrize("position", range(len(CASES)), ids=[c.name for c in CASES])
def test_stacked_clients_have_the_sum_of_the_loop_or_are_refused(position: int) -> None:
    case = CASES[position]
    if case.name in STACKED:
        check(case.run(engines.Stacked(3)), wanted(position), 2e-5)  # windows of 3 and 1
        return
    with pytest.raises(ValueError, match=r"engines\.Stacked cannot run .*Write engine=Auto"):
        case.run(engines.Stacked(3))


class Choosing(engines.Auto):
    """Auto that remembers what it chose."""

    chosen = ""

    def map_sum(self, work: Any, indices: Any) -> Any:
        total = super().map_sum(work, indices)
        self.chosen = self.choice
        return total


@pytest.mark.parametrize(
    ("algorithm", "model", "cohort", "stacks"),
    [
        (FEDAVG, lambda: fp.models.mlp(4, (6,), 3), 8, True),
        (replace(FEDAVG, delta=True), lambda: fp.models.mlp(4, (6,), 3), 8, True),
        (FEDAVG, lambda: fp.models.mlp(4, (6,), 3), 7, False),
        (FEDAVG, lambda: fp.models.mlp(4, (600, 600), 3), 8, False),
        (fp.fedavg(0.1, batch_size=None), lambda: fp.models.mlp(4, (420, 420), 3), 8, False),
        (FEDAVG, normed, 8, False),
        (FEDAVG, dropping, 8, False),
        (fp.ditto(0.1), lambda: fp.models.mlp(4, (6,), 3), 8, False),
    ],
)
def test_auto_stacks_what_is_tiny(algorithm: fp.Algorithm, model: Any, cohort: int, stacks: bool) -> None:
    clients, engine = classification_clients((*SIZES, 9)), Choosing()
    result = fp.run(algorithm, model(), clients, rounds=2, cohort=cohort, engine=engine)
    assert engine.chosen.startswith("stacked") == stacks
    want = fp.run(algorithm, model(), clients, rounds=2, cohort=cohort, engine=engines.Sequential(1))
    check(result, want, 2e-5 if stacks else 0.0)


def test_the_choice_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    fp.run(FEDAVG, fp.models.mlp(4, (6,), 3), classification_clients((*SIZES, 9)), rounds=2, cohort=8, progress=True)
    assert capsys.readouterr().err.count("stacked: 8 clients") == 1


def test_a_stack_with_a_value_that_is_not_finite_refuses_that_client_alone() -> None:
    """Client 2 of 8 learns from an infinite example: its NaN is refused, the others count, as in the loop."""
    clients = list(classification_clients((5,) * 8))
    x = clients[2].train.x.clone()
    x[0] = float("inf")
    clients[2] = replace(clients[2], train=fp.Examples(x, clients[2].train.y))
    results = [
        fp.run(FEDAVG, fp.models.mlp(4, (6,), 3), clients, rounds=1, engine=engine)
        for engine in (engines.Stacked(), engines.Sequential(1))
    ]
    check(results[0], results[1], 2e-5)
    assert [c.status for c in results[0].history[0].clients] == ["ok", "ok", "rejected", *["ok"] * 5]


def test_a_stacked_engine_looks_at_each_run_anew_and_tells_where_it_failed() -> None:
    """An engine that nobody has closed; a client without examples, which the error names with its round."""
    engine = engines.Stacked(2)
    fields = {"rounds": 1, "engine": engine}

    def go(algorithm: fp.Algorithm, clients: Any = CLIENTS) -> fp.Result:
        return fp.run(algorithm, fp.models.mlp(4, (6,), 3), clients, **fields)

    def other(record: fp.Round) -> None:
        with pytest.raises(ValueError, match="cannot run"):
            go(fp.ditto(0.1))

    fp.run(FEDAVG, fp.models.mlp(4, (6,), 3), CLIENTS, on_round=other, **fields)
    empty = replace(CLIENTS[3], train=CLIENTS[3].train.take(torch.tensor([], dtype=torch.int64)))
    with pytest.raises(ValueError, match="'client-3' has no training examples") as caught:
        go(FEDAVG, fp.data.LazyPopulation(7, [*CLIENTS[:3], empty, *CLIENTS[4:]].__getitem__))
    assert any(note.startswith("in round 1, clients ") for note in caught.value.__notes__)


def test_clients_of_a_stack_share_its_seconds() -> None:
    clients = classification_clients((5,) * 100)
    began = time.perf_counter()
    result = fp.run(FEDAVG, fp.models.mlp(4, (6,), 3), clients, rounds=1, engine=engines.Stacked())
    rows = result.history[0].clients
    assert 0 < sum(c.seconds + c.seconds_wire for c in rows) < time.perf_counter() - began
    assert all(c.seconds > 0 and c.seconds_wire > 0 for c in rows)


def test_equal_stacked_runs_have_equal_bits_also_resumed(tmp_path: Path) -> None:
    def go(rounds: int, **fields: Any) -> fp.Result:
        return fp.run(FEDAVG, fp.models.mlp(4, (6,), 3), CLIENTS, rounds=rounds, engine=engines.Stacked(3), **fields)

    whole = go(4, cohort=4)
    go(2, cohort=4, out=tmp_path)
    resumed = go(4, cohort=4, out=tmp_path, resume=True)
    check(resumed, whole, 0.0)


def test_the_table_is_not_trivial() -> None:
    """Statistics travel, clients are lost for both reasons, units go, states stay."""
    results = [wanted(i) for i in range(len(CASES))]
    statuses = {c.status for result in results for r in result.history for c in r.clients}
    assert {"ok", "dropped", "late"} <= statuses
    for case, result in zip(CASES, results, strict=True):
        first, _ = result.algorithm.start(Objective(case.model()).params())
        if first:  # local training shares nothing: its work is in the clients' states
            assert not equal(tree.flatten(first), tree.flatten(result.eta)), case.name
        else:
            assert any(result.store.load(i) for i in range(len(case.clients))), case.name
        assert not any(r.kept_eta for r in result.history), case.name
    slim = [r.history[-1].parameters_left for c, r in zip(CASES, results, strict=True) if c.name.startswith("slim")]
    full = [sum(p.numel() for p in c.model().parameters()) for c in CASES if c.name.startswith("slim")]
    assert all(left < whole for left, whole in zip(slim, full, strict=True))


RESUMED = [
    i for i, c in enumerate(CASES) if c.name in ("fedadam", "personal-states", "feedback-int8", "downlinks-conv")
]


@pytest.mark.parametrize("engine", ENGINES[1:], ids=lambda e: e.name)
@pytest.mark.parametrize("position", RESUMED, ids=[CASES[i].name for i in RESUMED])
def test_a_resumed_run_has_the_bits_of_the_loop(
    position: int, engine: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between checkpoints, and gone on with by the engine: what came after the checkpoint is redone."""
    monkeypatch.setattr(auto, "WORTH", engine.worth)
    case = CASES[position]

    def stop(record: fp.Round) -> None:
        if record.number == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        case.run(engine.make(), out=tmp_path, checkpoint_every=2, on_round=stop)
    again: list[fp.Round] = []
    got = case.run(engine.make(), out=tmp_path, checkpoint_every=2, resume=True, on_round=again.append)
    assert [r.number for r in again] == [3, 4]
    check(got, wanted(position), engine.tolerance)


@pytest.mark.parametrize("position", range(len(CASES)), ids=[c.name for c in CASES])
def test_every_algorithm_says_what_a_client_predicts(position: int) -> None:
    for row in wanted(position).personalised(CASES[position].clients[:2]):
        numbers = [v for v in row.values() if isinstance(v, float)]
        assert len(numbers) >= 2 and all(map(math.isfinite, numbers))


def test_an_engine_by_its_name() -> None:
    named = CASES[0].run("sequential")  # type: ignore[arg-type]
    check(named, CASES[0].run(engines.Sequential()), 0.0)
    with pytest.raises(ValueError, match=r"engine must be one of auto, sequential, .*got 'nonsense'"):
        CASES[0].run("nonsense")  # type: ignore[arg-type]
