"""Federated dropout: which part a client has, what it sends, and what the server makes of it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fedprior as fp
import laws
from cases import PRIORS, classification_clients, close, equal, redraw
from fedprior import inference, priors, structure
from fedprior.codecs import Sparse
from fedprior.codecs.frame import HEADER_BYTES
from fedprior.objective import Objective
from fedprior.rng import generator
from fedprior.structure import Group

CLIENTS = classification_clients((6, 9, 4, 7))
MODEL = fp.models.mlp(4, (6, 5), 3)


def kept(rate: str, units: int) -> int:
    return max(1, math.ceil((1 - Fraction(rate)) * units))


@pytest.mark.parametrize("rate", ["0", "0.1", "0.29", "0.5", "0.7", "0.9", "0.99"])
def test_a_part_has_a_fixed_number_of_units(rate: str) -> None:
    for units in (2, 3, 10, 100):
        prior = priors.Dropout(float(rate), groups=(Group("g", units, ()),))
        eta = prior.init({"w": torch.ones(1)})
        gate = prior.sample(eta, generator(0, "z")).keep["g"]
        assert gate.sum() == kept(rate, units) and ((gate == 0) | (gate == 1)).all()
        assert torch.equal(eta.keep["g"], torch.full((units,), kept(rate, units) / units))


def test_all_parts_are_equally_likely() -> None:
    """2 of 5 units: ten parts, each within 5 standard errors of a tenth of the draws."""
    prior, draws = priors.Dropout(0.6, groups=(Group("g", 5, ()),)), 3000
    eta = prior.init({"w": torch.ones(1)})
    rng = generator(0, "z")
    seen = Counter(tuple(prior.sample(eta, rng).keep["g"].tolist()) for _ in range(draws))
    assert len(seen) == math.comb(5, 2)
    error = math.sqrt(draws * 0.1 * 0.9)
    assert all(abs(count - draws / 10) < 5 * error for count in seen.values())


def linear_nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.arange(4.0) - 1, torch.arange(4.0) + 0.5
    return {
        "dense": (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)), (7, 3)),
        "conv": (nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 2)), (7, 1, 6, 6)),
        "batch-norm": (
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 2), norm, nn.Flatten(), nn.Linear(36, 2)),
            (7, 1, 6, 6),
        ),
    }


@pytest.mark.parametrize("name", linear_nets())
def test_the_whole_linear_model_is_the_mean_of_all_its_parts(name: str) -> None:
    """By enumeration; without the scale of `point` it would not be."""
    model, shape = linear_nets()[name]
    objective = Objective(redraw(model.double()).eval())
    x = torch.randn(shape, generator=generator(0, "x"), dtype=torch.float64)
    prior = priors.Dropout(0.5).bind(objective.model, x)
    eta = prior.init(objective.params())
    assert close(prior.point(eta), objective.params(), 1e-14)
    choices = [itertools.combinations(range(g.units), kept("0.5", g.units)) for g in prior.groups]
    outputs = []
    for chosen in itertools.product(*choices):
        gate = {g.name: torch.zeros(g.units).double() for g in prior.groups}
        for z, units in zip(gate.values(), chosen, strict=True):
            z[list(units)] = 1
        part = prior.Eta(structure.apply(structure.alive(prior.groups, gate, eta.mean), eta.mean), gate)
        cut = prior.cut(part)
        small = objective.cut(cut)
        assert small.count(cut.gather(part.mean)) < objective.count(eta.mean)
        small.train(False)
        outputs.append(small.outputs(cut.gather(prior.point(part)), x))
        assert equal(prior.point(part), part.mean)
    assert len(outputs) == math.prod(math.comb(g.units, kept("0.5", g.units)) for g in prior.groups)
    mean = torch.stack(outputs).mean(0)
    assert torch.allclose(mean, objective.outputs(prior.point(eta), x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(mean, objective.outputs(eta.mean, x), rtol=1e-2, atol=1e-2)


def test_rate_0_is_fedavg_bit_for_bit() -> None:
    def params(algorithm: fp.Algorithm) -> fp.Params:
        return fp.run(algorithm, MODEL, CLIENTS, rounds=3, cohort=3).params

    assert equal(params(fp.feddropout(0.1, 0.0, 2, 4)), params(fp.fedavg(0.1, 2, 4)))
    assert not close(params(fp.feddropout(0.1, 0.5, 2, 4)), params(fp.fedavg(0.1, 2, 4)), 1e-2)


def masks(z: fp.Params) -> fp.Params:
    """Which entries of an mlp(4, (6, 5), 3) are held, from the units alone."""
    a, b = z["1"], z["3"]
    every = a.new_ones(4), a.new_ones(3)
    weights = {
        "1.weight": torch.outer(a, every[0]),
        "3.weight": torch.outer(b, a),
        "5.weight": torch.outer(every[1], b),
    }
    biases = {"1.bias": a, "3.bias": b, "5.bias": every[1]}
    return {f"{i}.{kind}": {**weights, **biases}[f"{i}.{kind}"] for i in (1, 3, 5) for kind in ("weight", "bias")}


def trained_by_hand(start: fp.Params, held: fp.Params, data: fp.Examples, lr: float, steps: int) -> fp.Params:
    """Full-batch gradient steps on the whole model with zeros for what is not held."""
    phi = {k: (v * held[k]).requires_grad_() for k, v in start.items()}
    for _ in range(steps):
        h = data.x
        for i in (1, 3, 5):
            h = F.linear(h if i == 1 else h.relu(), phi[f"{i}.weight"], phi[f"{i}.bias"])
        grads = torch.autograd.grad(F.cross_entropy(h, data.y), list(phi.values()))
        phi = {
            k: (p.detach() - lr * g * held[k]).requires_grad_() for (k, p), g in zip(phi.items(), grads, strict=True)
        }
    return {k: p.detach() for k, p in phi.items()}


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_a_weight_is_the_mean_of_the_clients_that_held_it(weighting) -> None:
    """Entry by entry, against masked training; an entry that nobody held stays."""
    clients = classification_clients((6, 9, 4), dtype=torch.float64)
    model = fp.models.mlp(4, (6, 5), 3).double()
    algorithm = replace(fp.feddropout(0.3, 0.7, 2, None, weighting), codec=Sparse("float64"))
    result = fp.run(algorithm, model, clients, rounds=2)
    prior = result.algorithm.prior
    eta, counts = prior.init(Objective(model).params()), Counter()
    for number in (1, 2):
        drawn = [prior.sample(eta, generator(0, number, c.index, "downlink")).keep for c in clients]
        held = [masks(z) for z in drawn]
        phi = [trained_by_hand(eta.mean, m, c.train, 0.3, 2) for m, c in zip(held, clients, strict=True)]
        mean = {k: v.clone() for k, v in eta.mean.items()}
        for name, value in mean.items():
            for j in itertools.product(*map(range, value.shape)):
                holders = [s for s in range(3) if held[s][name][j]]
                weights = [len(clients[s].train) if weighting == "examples" else 1 for s in holders]
                counts[len(holders)] += 1
                if holders:
                    pairs = zip(weights, holders, strict=True)
                    value[j] = sum(w * float(phi[s][name][j]) for w, s in pairs) / sum(weights)
        eta = eta._replace(mean=mean)
    assert set(counts) == {0, 1, 2, 3}
    assert close(result.eta.mean, eta.mean, 1e-12) and equal(result.eta.keep, eta.keep)


class OwnersCount(priors.Dropout):
    """Counts whoever has the unit that owns a weight, whatever it reads."""

    def _holders(self, eta, t):
        return {k: a.amax(tuple(range(1, a.ndim)), keepdim=True) for k, a in super()._holders(eta, t).items()}


class AllClientsCount(priors.Dropout):
    def _holders(self, eta, t):
        return {k: torch.full_like(a, t.clients) for k, a in super()._holders(eta, t).items()}


@pytest.mark.parametrize("wrong", [OwnersCount, AllClientsCount], ids=lambda w: w.__name__)
def test_the_laws_catch_a_wrong_count(wrong: type) -> None:
    case = next(c for c in PRIORS if c.name == "dropout-conv-3")
    laws.stationary(case)
    eta, total = case.eta(), sum(case.clients()[1:], case.clients()[0])
    wrong_eta = wrong(0.5, 3.0, case.prior.groups).m_step(eta, total)
    assert max(float(g.abs().max()) for g in laws.gradient(case, wrong_eta, total).values()) > 0.1


def bits(count: int) -> int:
    return math.ceil(count / 8)


def test_bytes_are_those_of_the_kept_entries() -> None:
    """Both directions, every client: 4 bytes an entry, a bit a row and column, a byte a tensor."""
    clients, rate, widths = classification_clients((20, 30, 25), inputs=16, classes=5), "0.25", (16, 30, 20, 5)
    parts = (16, kept(rate, 30), kept(rate, 20), 5)
    want = HEADER_BYTES
    for inputs, units, some_inputs, some_units in zip(widths, widths[1:], parts, parts[1:], strict=False):
        want += bits(units) + bits(inputs) + 1 + 4 * some_units * some_inputs
        want += bits(units) + 1 + 4 * some_units
    gates = sum(bits(units) + 1 + 4 for units in widths[1:3])  # open gates are equal: one of them is sent
    result = fp.run(fp.feddropout(0.1, float(rate)), fp.models.mlp(16, (30, 20), 5), clients, rounds=2)
    for client in (c for record in result.history for c in record.clients):
        assert (client.bytes_up, client.bytes_down) == (want, want + gates)
    dense = fp.run(fp.fedavg(0.1), fp.models.mlp(16, (30, 20), 5), clients, rounds=2)
    assert result.bytes_up < 0.75 * dense.bytes_up and result.parameters_left == result.parameters


def test_a_client_trains_a_model_of_the_size_of_its_part() -> None:
    sizes = []

    def sgd(tensors: list[torch.Tensor]) -> torch.optim.Optimizer:
        sizes.append([tuple(t.shape) for t in tensors])
        return torch.optim.SGD(tensors, lr=0.1)

    algorithm = fp.Algorithm(priors.Dropout(0.5), inference.Point(0.1, optimizer=sgd))
    fp.run(algorithm, MODEL, CLIENTS, rounds=1, engine=fp.engines.Sequential(1))  # in this process
    a, b = kept("0.5", 6), kept("0.5", 5)
    assert sizes == [[(a, 4), (a,), (b, a), (b,), (3, b), (3,)]] * len(CLIENTS)


@pytest.mark.parametrize("fields", [{"rate": 1.0}, {"rate": -0.1}, {"precision": -1.0}, {"rate": float("nan")}])
def test_rates_that_cannot_be_are_refused(fields) -> None:
    with pytest.raises(ValueError, match="0 <= rate < 1"):
        priors.Dropout(**fields)


def test_gates_of_the_clients_own_are_refused_before_round_one() -> None:
    with pytest.raises(TypeError, match=r"drawn by the server.*inference.Point"):
        fp.run(fp.Algorithm(priors.Dropout(), inference.Gated(0.1)), MODEL, CLIENTS, rounds=1)
