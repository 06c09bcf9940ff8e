"""Budgets of bytes for FedSparse: what is planned fits and is used, and what does not fit is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedprior as fp
from budget_calls import MODELS, ROUNDS, run, total
from cases import equal, without_seconds
from coupled_nets import norm_net
from fedprior import inference, planning, priors, tree
from fedprior.budget import Budget
from fedprior.codecs import Sparse
from fedprior.objective import Objective
from fedprior.records import Round
from fedprior.rng import generator

TYPES = ("float32", "int8", "int4")


def sparse(mb: float, value_type=None) -> fp.Algorithm:
    return fp.fedsparse(lr=0.1, budget_mb=mb, value_type=value_type, batch_size=8)


def planned(name: str, algorithm: fp.Algorithm, rounds: int = ROUNDS) -> fp.Algorithm:
    model, clients = MODELS[name]
    bound = algorithm.bind(model, clients[0].train.x[:1])
    return planning.plan(bound, Objective(model).params(), rounds, len(clients))


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


@pytest.mark.parametrize("value_type", ["float32", "int8"])
def test_new_norms_are_planned_as_trained_ones(value_type: str) -> None:
    """A new norm's values are equal, and would be sent as one."""
    model = norm_net(24, 20)
    new = Objective(model).params()
    trained = {k: v + torch.rand(v.shape, generator=generator(0, k)) if v.ndim == 1 else v for k, v in new.items()}
    bound = fp.fedsparse(budget_mb=0.3, value_type=value_type).bind(model, torch.zeros(1, 1, 8, 8))
    densities = [planning.plan(bound, params, ROUNDS, 3).prior.density for params in (new, trained)]  # type: ignore
    assert densities[0] == pytest.approx(densities[1], rel=0.03)


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


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("rounds", [2, 3, 4, 5])
def test_a_short_run_is_not_cut_short(value_type, rounds: int) -> None:
    """Its model shrinks by a third in one round: the next payloads are much shorter than the last ones."""
    mb = {"float32": 0.012, "int8": 0.0055, "int4": 0.005}[value_type] * rounds
    result = run("lenet", sparse(mb, value_type), rounds)
    assert len(result.history) == rounds and total(result) <= mb * 1e6
    assert result.history[-1].bytes_down < 0.9 * result.history[0].bytes_down


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


@pytest.mark.parametrize("make", [fp.fedsparse, fp.fedsparsemixture], ids=lambda f: f.__name__)
@pytest.mark.parametrize("value_type", ["float32", "bfloat16", "int8", "int4"])
def test_an_entropy_that_is_given_is_taken(make, value_type: str) -> None:
    for entropy in ("none", "zlib", "zstd"):
        algorithm = make(value_type=value_type, entropy=entropy)
        assert algorithm.codec == Sparse(value_type, entropy)
        assert algorithm.downlink == (Sparse("int8", entropy) if value_type == "int4" else None)
    usual = "none" if value_type == "float32" else "zlib"
    assert make(value_type=value_type) == make(value_type=value_type, entropy=usual)


def test_nothing_is_planned_for_other_algorithms() -> None:
    for algorithm in (fp.fedavg(), fp.fedsparse(lambda_0=0.1), fp.feddropout()):
        bound = planned("mlp", algorithm)
        assert bound == algorithm.bind(MODELS["mlp"][0], torch.zeros(1, 4))
