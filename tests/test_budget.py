"""Budgets of bytes: what is planned fits and is used, what does not fit is refused, and any run stops in time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import classification_clients, equal, image_clients, without_seconds
from fedprior import Availability, Client, inference, planning, priors, tree
from fedprior.budget import Budget
from fedprior.codecs import Sparse
from fedprior.engines.sequential import summed
from fedprior.objective import Objective
from fedprior.records import ClientRecord, Round

IMAGES, VECTORS = image_clients(3, 24), classification_clients((20, 14, 9))
MODELS: dict[str, tuple[nn.Module, list[Client]]] = {
    "lenet": (fp.models.lenet((6, 8), 16, 4, 16), IMAGES),
    "mlp": (fp.models.mlp(4, (40, 30), 3), VECTORS),
}
ROUNDS = 9
TYPES = ("float32", "int8", "int4")


def run(name: str, algorithm: fp.Algorithm, rounds: int = ROUNDS, **fields) -> fp.Result:
    model, clients = MODELS[name]
    return fp.run(algorithm, model, clients, rounds=rounds, **fields)


def sparse(mb: float, value_type=None) -> fp.Algorithm:
    return fp.fedsparse(lr=0.1, budget_mb=mb, value_type=value_type, batch_size=8)


def planned(name: str, algorithm: fp.Algorithm, rounds: int = ROUNDS) -> fp.Algorithm:
    model, clients = MODELS[name]
    bound = algorithm.bind(model, clients[0].train.x[:1])
    return planning.plan(bound, Objective(model).params(), rounds, len(clients))


def total(result: fp.Result) -> int:
    return result.bytes_up + result.bytes_down


PLANNED = [
    ("lenet", "float32", 0.03),
    ("lenet", "float32", 0.15),
    ("lenet", "int8", 0.03),
    ("lenet", "int4", 0.015),
    ("lenet", None, 0.05),
    ("mlp", "float32", 0.02),
    ("mlp", "float32", 0.1),
    ("mlp", "int8", 0.04),
    ("mlp", "int4", 0.04),
    ("mlp", None, 0.015),
]


@pytest.mark.parametrize(("name", "value_type", "mb"), PLANNED)
def test_a_planned_run_uses_its_budget_and_no_more(name: str, value_type, mb: float) -> None:
    result = run(name, sparse(mb, value_type))
    assert len(result.history) == ROUNDS
    assert 0.7 * mb * 1e6 <= total(result) <= mb * 1e6
    prior = result.algorithm.prior
    assert isinstance(prior, priors.SharedGates) and prior.density is not None
    assert result.parameters_left <= max(prior.density * result.parameters, least(name))


def least(name: str) -> int:
    """Parameters of the model with one unit a group."""
    prior = priors.SharedGates(1e-6, 1e-6, 1, hold=0).bind(MODELS[name][0], MODELS[name][1][0].train.x[:1])
    return prior.live(prior.init(Objective(MODELS[name][0]).params()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value_type", [None, "float32"])
def test_too_little_is_refused_with_what_would_do(name: str, value_type, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is too small for 9 rounds of 3 clients") as error:
        run(name, sparse(1e-4, value_type), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    enough = float(str(error.value).split(" needs ")[1].split(" MB")[0])
    result = run(name, sparse(enough, value_type))
    assert len(result.history) == ROUNDS and total(result) <= enough * 1e6
    assert result.parameters_left == least(name)
    with pytest.raises(ValueError, match="too small"):
        planned(name, sparse(0.98 * enough, value_type))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value_type", TYPES)
def test_more_bytes_never_leave_less(name: str, value_type) -> None:
    """For one value type: where int8 takes over from int4, the density falls back to 2 %."""
    densities = [planned(name, sparse(0.03 * 1.4**i, value_type)).prior.density for i in range(12)]  # type: ignore
    assert densities == sorted(densities) and densities[0] < 0.2 and densities[-1] == 1


@pytest.mark.parametrize("name", MODELS)
def test_cheaper_values_leave_more(name: str) -> None:
    for few, many in itertools.pairwise(planned(name, sparse(0.05, v)).prior.density for v in TYPES):  # type: ignore
        assert few < many


def test_int4_where_int8_would_leave_less_than_2_percent() -> None:
    found = []
    for mb in (0.0105, 0.0115, 0.014, 0.03):
        both, int8 = planned("mlp", sparse(mb)), planned("mlp", sparse(mb, "int8"))
        found.append(both.codec.value_type)  # type: ignore
        assert (found[-1] == "int8") == (int8.prior.density >= 0.02) and both.delta  # type: ignore
        only = planned("mlp", sparse(mb, found[-1]))
        assert both.prior == only.prior and both.codec == only.codec
    assert found == sorted(found) and len(set(found)) == 2  # "int4" comes first


def test_a_start_of_the_users_own_bounds_the_density() -> None:
    made = fp.Algorithm(priors.SharedGates(None, start=0.4), inference.Gains(0.1), codec=Sparse(), budget=Budget(50))
    prior = planned("mlp", made).prior
    assert isinstance(prior, priors.SharedGates) and (prior.density, prior.start, prior.hold, prior.steps) == (
        0.4,
        0.4,
        4,
        1,
    )
    with pytest.raises(ValueError, match="planned from a budget"):
        planned("mlp", replace(made, budget=None))


BYTES = 3 * 2 * len(fp.fedavg().codec.encode(Objective(MODELS["mlp"][0]).params(), 0.0))  # a round of FedAvg


def limited(mb: float) -> fp.Algorithm:
    return replace(fp.fedavg(), budget=Budget(mb))


@pytest.mark.parametrize("fits", [1, 3, 5])
def test_a_run_stops_before_it_exceeds_its_budget(fits: int, tmp_path: Path) -> None:
    """Its last round is evaluated and saved whatever the other rounds are; going on changes nothing."""
    mb, test = (fits + 0.5) * BYTES / 1e6, VECTORS[0].train
    fields = {"test": test, "evaluate_every": 4, "checkpoint_every": 4, "out": tmp_path}
    result = run("mlp", limited(mb), 20, **fields)
    assert [r.number for r in result.history] == list(range(1, fits + 1))
    assert total(result) == fits * BYTES <= mb * 1e6
    assert [bool(r.metrics) for r in result.history] == [n % 4 == 0 or n == fits for n in range(1, fits + 1)]
    plain = run("mlp", fp.fedavg(), fits, test=test)
    assert equal(plain.params, result.params) and plain.history[-1].metrics == result.history[-1].metrics
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    more: list[Round] = []
    again = run("mlp", limited(mb), 20, resume=True, on_round=more.append, **fields)
    assert not more and again.history == result.history and equal(again.params, result.params)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    with pytest.raises(ValueError, match="its algorithm was"):
        run("mlp", limited(2 * mb), 20, resume=True, **fields)


@pytest.mark.parametrize("algorithm", [fp.fedavg(), fp.feddropout(), fp.fedsparse(density=0.5), fp.topk()], ids=str)
def test_less_than_one_round_is_refused(algorithm: fp.Algorithm) -> None:
    with pytest.raises(ValueError, match="too small for one round of 3 clients: one needs") as error:
        run("mlp", replace(algorithm, budget=Budget(1e-4)), 20)
    enough = float(str(error.value).split(" needs ")[1].split(" MB")[0])
    result = run("mlp", replace(algorithm, budget=Budget(1.1 * enough)), 20)
    assert len(result.history) == 1 and total(result) <= 1.1 * enough * 1e6


def round_of(number: int, *clients: tuple[int, int]) -> Round:
    """A round whose clients received and sent so many bytes."""
    records = tuple(ClientRecord(i, "", "ok", 1, down, up, 0.0) for i, (down, up) in enumerate(clients))
    down, up = (sum(side) for side in zip(*clients, strict=True))
    return Round(number, down, up, 0, 0.0, 0.0, clients=records)


@dataclass(frozen=True)
class Spent:
    """Rounds, what is known of the next, and the bytes that it may need, by hand: 1.05 x 2 clients x the longest."""

    history: list[Round]
    bytes: float
    down: float | None = None
    up: float | None = None


SPENT = [
    Spent([], 0),
    Spent([round_of(1, (100, 50), (100, 60))], 310 + 2.1 * 160),
    Spent([round_of(1, (100, 50), (100, 0))], 250 + 2.1 * 150),  # one was dropped: it may answer next time
    Spent([round_of(1, (100, 50), (80, 60)), round_of(2, (90, 0), (90, 0))], 290 + 180 + 2.1 * 150),
    Spent([round_of(1, (300, 50), (300, 60)), round_of(2, (40, 20), (40, 10))], 710 + 110 + 2.1 * 60),
    Spent([], 0, 100, 50),
    Spent([round_of(1, (100, 50), (100, 60))], 310 + 2 * 90 + 2.1 * 60, 90),
    Spent([round_of(1, (100, 50), (100, 60))], 310 + 2 * 130 + 2.1 * 60, 130),
    Spent([round_of(1, (100, 50), (100, 60))], 310 + 2.1 * 100 + 2 * 62, None, 62),
    Spent([round_of(1, (100, 50), (100, 60))], 310 + 2 * 90 + 2.1 * 60, 90, 64),  # 5 % more than 60 are less than 64
    Spent([round_of(1, (100, 0), (100, 0))], 200 + 2 * 90 + 2 * 64, 90, 64),
]


@pytest.mark.parametrize("case", SPENT, ids=lambda c: f"{c.bytes:g}")
def test_when_it_is_spent(case: Spent) -> None:
    assert not Budget((case.bytes + 0.01) / 1e6).spent(case.history, 2, case.down, case.up)
    if case.history:
        assert Budget((case.bytes - 0.01) / 1e6).spent(case.history, 2, case.down, case.up)


@dataclass
class Watching:
    """An engine that asks what is known of each round, and keeps it beside what the round was."""

    seen: list[tuple[int | None, int | None, list[ClientRecord]]]

    def map_sum(self, work, indices):
        down, up = planning.known(work.algorithm, work.like)
        total = summed(work, map(work.client, indices))
        self.seen.append((down, up, list(work.records)))
        return total


KNOWN = [
    (fp.fedavg(), "exact"),
    (fp.fedavg(value_type="int4"), "exact"),
    (fp.fedavg(value_type="int8", entropy="zlib"), "bound"),
    (fp.fedsparse(0.1, density=0.2, batch_size=8), "late"),
    (fp.fedsparse(0.1, density=0.2, batch_size=8, value_type="bfloat16", entropy="none"), "late"),
    (fp.fedsparse(0.1, density=0.2, batch_size=8, value_type="int8", entropy="none"), "late"),
    (fp.fedsparse(0.1, density=0.2, batch_size=8, value_type="int8"), "bound"),
    (fp.topk(), "down"),
    (fp.grouplasso(), "down"),
    (fp.feddropout(), "nothing"),
]


@pytest.mark.parametrize(("algorithm", "kind"), KNOWN, ids=lambda v: v if isinstance(v, str) else str(v)[:60])
def test_what_is_known_of_a_round_before_it_begins(algorithm: fp.Algorithm, kind: str) -> None:
    """Broadcasts to the byte; uploads to the byte if nothing is dropped or coded, else a bound that none exceeds.

    "late": to the byte from round 6 on, when the density is reached. Before, units that are of no use yet have gains of
    zero, which are not sent.
    """
    watching = Watching([])
    run("lenet", algorithm, engine=watching)
    assert len(watching.seen) == ROUNDS
    for number, (down, up, records) in enumerate(watching.seen, 1):
        exact = kind == "exact" or (kind == "late" and number > 5)
        assert (down is None) == (kind == "nothing") and (up is None) == (kind in ("nothing", "down"))
        assert down is None or {c.bytes_down for c in records} == {down}
        longest = max(c.bytes_up for c in records)
        assert up is None or (longest == up if exact else 0.75 * up < longest <= up)


@pytest.mark.parametrize("fits", [1, 2, 4])
def test_a_budget_of_so_many_rounds_pays_for_them_to_the_byte(fits: int) -> None:
    for less, wanted in ((0, fits), (1, fits - 1)):
        if wanted:
            assert len(run("mlp", limited((fits * BYTES - less) / 1e6), 20).history) == wanted


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("rounds", [2, 3, 4, 5])
def test_a_short_run_is_not_cut_short(value_type, rounds: int) -> None:
    """Its model shrinks by a third in one round: the next payloads are much shorter than the last ones."""
    mb = {"float32": 0.012, "int8": 0.0055, "int4": 0.005}[value_type] * rounds
    result = run("lenet", sparse(mb, value_type), rounds)
    assert len(result.history) == rounds and total(result) <= mb * 1e6
    assert result.history[-1].bytes_down < 0.9 * result.history[0].bytes_down


@pytest.mark.parametrize("algorithm", [fp.fedavg(), fp.feddropout(), fp.fedsparse(density=0.2)], ids=lambda a: a.name)
def test_clients_that_do_not_answer_do_not_fool_it(algorithm: fp.Algorithm) -> None:
    mb = 4.5 * BYTES / 1e6
    used = []
    for seed in range(4):
        fleet = Availability(dropout=0.7)
        result = run("mlp", replace(algorithm, budget=Budget(mb)), 60, availability=fleet, seed=seed)
        used.append(total(result) / 1e6)
        assert len(result.history) < 60
    assert max(used) <= mb and min(used) > 0.7 * mb


class Stop(Exception):
    """Raised by on_round: the user's Ctrl-C."""


@pytest.mark.parametrize("options", [{"budget_mb": 0.04}, {"density": 0.2}, {"density": 0.2, "value_type": "int4"}])
def test_an_interrupted_run_keeps_its_plan(options: dict, tmp_path: Path) -> None:
    def stop(record: Round) -> None:
        if record.number == 3:
            raise Stop

    algorithm = fp.fedsparse(batch_size=8, **options)
    with pytest.raises(Stop):
        run("mlp", algorithm, out=tmp_path, on_round=stop)
    resumed, whole = run("mlp", algorithm, out=tmp_path, resume=True), run("mlp", algorithm)
    assert equal(tree.flatten(resumed.eta), tree.flatten(whole.eta))
    assert without_seconds(resumed.history) == without_seconds(whole.history)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1, "budget_mb": 5}, "give one of them, got 0.1, 5 and None"),
        ({"density": 0.1, "lambda_0": 0.0}, "give one of them"),
        ({"budget_mb": 5, "lambda_0": 0.1}, "give one of them"),
        ({"density": 0.0}, "density is a fraction"),
        ({"density": 1.5}, "density is a fraction"),
        ({"density": float("nan")}, "density is a fraction"),
        ({"budget_mb": 0}, "budget_mb must be a positive number"),
        ({"budget_mb": -1.0}, "budget_mb must be a positive number"),
        ({"budget_mb": float("inf")}, "budget_mb must be a positive number"),
        ({"budget_mb": float("nan")}, "budget_mb must be a positive number"),
        ({"lambda_0": -0.1}, "lambda_0"),
        ({"lambda_0": 0.1, "momentum": 0.5}, "momentum=0.5 is not used with lambda_0"),
        ({"lambda_0": 0.1, "momentum": 0.0}, "momentum=0.0 is not used with lambda_0"),
        ({"lambda_0": 0.0, "activations": 0.1}, "activations=0.1 is not used with lambda_0"),
        ({"gate_lr": 0.05}, "gate_lr=0.05 is for gates that clients learn"),
        ({"budget_mb": 5, "gate_lr": 0.05}, "gate_lr=0.05 is for gates that clients learn"),
        ({"lambda_0": 0.1, "gate_lr": 0.0}, "need gate_lr > 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.fedsparse(**options)


def test_what_an_argument_makes_of_fedsparse() -> None:
    default, dense, price = fp.fedsparse(), fp.fedsparse(density=1.0), fp.fedsparse(lambda_0=0.0)
    assert default.prior == priors.SharedGates(0.05) and default.weighting == "examples"
    assert dense.prior == priors.SharedGates(1.0) and isinstance(default.inference, inference.Gains)
    assert isinstance(price.prior, priors.SpikeSlab) and isinstance(price.inference, inference.Gated)
    assert default.inference.lr == price.inference.lr == 0.2
    assert default.server == fp.server.Momentum(1.0, 0.5) and price.server == fp.server.Exact()
    assert fp.fedsparse(momentum=0.0).server == fp.server.Exact()
    assert fp.fedsparse(activations=0.5).prior == priors.SharedGates(0.05, activations=0.5)
    budget = fp.fedsparse(budget_mb=3, entropy="none")
    assert budget.budget == Budget(3, ("int8", "int4")) and budget.codec == Sparse("int8") and budget.delta
    assert fp.fedsparse(budget_mb=3, value_type="float32").budget == Budget(3, ("float32",))
    rows = [fp.fedsparse(value_type=v) for v in ("float32", "bfloat16", "int2")]
    assert [(a.codec.value_type, a.codec.entropy, a.delta) for a in rows] == [  # type: ignore
        ("float32", "none", False),
        ("bfloat16", "zlib", False),
        ("int2", "zlib", True),
    ]
    assert [a.downlink for a in rows] == [None, None, Sparse("int8", "zlib")]
    assert default.codec == Sparse() and not default.delta and default.budget is None


def test_nothing_is_planned_for_other_algorithms() -> None:
    for algorithm in (fp.fedavg(), fp.fedsparse(lambda_0=0.1), fp.feddropout()):
        bound = planned("mlp", algorithm)
        assert bound == algorithm.bind(MODELS["mlp"][0], torch.zeros(1, 4))
