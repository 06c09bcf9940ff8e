"""Deltas: the server has what it would have had without them, but for the codec's errors; and those telescope."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

import fedprior as fp
from cases import PRIORS, Case, classification_clients, close, equal, normal, point
from fedprior import Stats, inference, posteriors, priors, structure, tree, wire
from fedprior.codecs import Dense, Sparse, TopK, schema_of
from fedprior.rng import generator
from learned_scale import LearnedScale

GATED = [c for c in PRIORS if isinstance(c.prior, priors.SpikeSlab)]
SHARED = [c for c in PRIORS if isinstance(c.prior, priors.SharedGates)]
PARTS = [replace(c, posterior=point) for c in PRIORS if isinstance(c.prior, priors.Dropout)]
CODECS = [Dense(), Dense("float64", "zlib"), Sparse(), Sparse("float64"), TopK(1.0), TopK(1.0, "float64")]
CASES = [c for c in PRIORS if not isinstance(c.prior, priors.Dropout)] + PARTS
prior_cases = pytest.mark.parametrize("case", CASES, ids=str)


def algorithm(case: Case, codec: Any, **more: Any) -> fp.Algorithm:
    e_step = inference.Gated(0.1) if case in GATED else inference.Gains(0.1) if case in SHARED else inference.Point(0.1)
    e_step = case.e_step or e_step
    return fp.Algorithm(case.prior, e_step, codec=codec, downlink=Dense("float64"), **{"delta": True} | more)


def dyadic(value: Any) -> Any:
    """Multiples of 1/128 between -2 and 2 in all dicts of an eta or a posterior: few enough bits for exact products."""

    def rounded(params: Any) -> Any:
        if isinstance(params, tuple):
            return tuple(map(dyadic, params))
        return tree.map(lambda v: (v.clamp(-2, 2) * 128).round() / 128, params)

    if isinstance(value, tuple):
        return type(value)(*map(rounded, value))
    return replace(value, **{f.name: rounded(getattr(value, f.name)) for f in fields(value)})


def received(case: Case) -> Any:
    """What a client is sent: eta, or its own part of it."""
    made, eta = algorithm(case, Dense()), case.eta()
    return made.sample(eta, generator(0, "downlink"))


def arrived(made: fp.Algorithm, eta: Any, stats: Stats, weight: float) -> Stats:
    payload, residual = wire.encode(made, eta, stats, weight)
    assert residual == {}
    return wire.decode(made, eta, payload, schema_of(wire.flat(stats)))


@prior_cases
@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_delta_arrives_as_the_plain_message(case: Case, codec: Any, weight: float) -> None:
    """With values of so few bits that nothing is rounded: not a bit of difference."""
    made, eta = algorithm(case, codec), dyadic(received(case))
    stats = made.message(eta, dyadic(case.posterior(case, generator(0, "q"))))
    got, want = arrived(made, eta, stats, weight), stats.weighted(weight)
    assert got.clients == want.clients == weight and equal(wire.flat(got), wire.flat(want))
    assert list(wire.flat(got)) == list(wire.flat(want))


@prior_cases
def test_the_error_is_that_of_the_delta(case: Case) -> None:
    """Values of any bits: float64 up to its own rounding, float32 to 2^-24 of the difference, not of the value.

    A reference such as SpikeSlab's z w is that of the gates as they arrive, and takes their rounding over.
    """
    eta, weight = received(case), 7.0
    stats = algorithm(case, Dense()).message(eta, case.posterior(case, generator(0, "q")))
    want = wire.flat(stats.weighted(weight))
    assert close(wire.flat(arrived(algorithm(case, Dense("float64")), eta, stats, weight)), want, 1e-14)
    made = algorithm(case, Dense())
    got, reference = wire.flat(arrived(made, eta, stats, weight)), wire.flat(made.reference(eta, stats))
    for name, value in want.items():
        r = weight * reference.get(name, torch.zeros_like(value))
        rounded = (value - r).abs() + (r.abs() if hasattr(case.prior, "reference") else 0)
        assert ((got[name] - value).abs() <= 2**-24 * rounded + 1e-13).all(), name


def test_what_fedavg_sends() -> None:
    """weight (phi - w)."""
    case = PRIORS[0]
    made, eta = algorithm(case, Dense("float64")), case.eta()
    q = case.posterior(case, generator(0, "q"))
    payload, _ = wire.encode(made, eta, made.message(eta, q), 5.0)
    sent, clients = made.codec.decode(payload, schema_of({f"phi/{k}": v for k, v in q.phi.items()}))
    assert clients == 5
    assert equal(sent, {f"phi/{k}": 5 * (v - eta.mean[k]) for k, v in q.phi.items()})


@pytest.mark.parametrize("case", GATED, ids=str)
def test_closed_gates_send_nothing(case: Case) -> None:
    """The difference is zero wherever z phi is, and Sparse drops as many rows and columns as without deltas."""
    made, eta = algorithm(case, Sparse("float64")), case.eta()
    q = case.posterior(case, generator(0, "q"))
    some = {k: torch.arange(len(v)).remainder(2).double() for k, v in q.gate.items()}
    stats = made.message(eta, replace(q, gate=some))
    payload, _ = wire.encode(made, eta, stats, 1.0)
    sent, _ = made.codec.decode(payload, schema_of(wire.flat(stats)))
    plain = wire.flat(stats)
    assert len(payload) == len(made.codec.encode(plain, 1.0))
    assert any((v == 0).any() for v in plain.values())
    for name, value in plain.items():
        assert not sent[name][value == 0].any()
        assert name.startswith("z_phi/") != torch.equal(sent[name], value)


@dataclass(frozen=True)
class Idle:
    """An E-step that learns nothing."""

    def start(self, prior, eta) -> posteriors.Point:
        return posteriors.Point(prior.point(eta))

    def e_step(self, objective, prior, eta, client, state, rng):
        return self.start(prior, eta), state


@pytest.mark.parametrize("codec", [Dense("int2"), TopK(0.1)], ids=repr)
def test_deltas_are_taken_from_the_eta_that_arrived(codec: Any) -> None:
    """Clients that learn nothing send zeros, and the new eta is the one that a rounded broadcast told them."""
    clients, model, downlink = classification_clients((4, 8)), fp.models.softmax(4, 3), Dense("int4")
    made = fp.Algorithm(priors.Gaussian(), Idle(), codec=codec, downlink=downlink, delta=True, weighting="examples")
    result = fp.run(made, model, clients, rounds=1)
    message = {f"mean/{k}": p.detach() for k, p in model.named_parameters()}
    told, _ = downlink.decode(downlink.encode(message, 0.0), schema_of(message))
    assert not equal(told, message)
    for name, value in told.items():  # 4/12 w + 8/12 w, up to rounding
        assert torch.allclose(result.params[name.removeprefix("mean/")], value, rtol=1e-6, atol=0)
    assert result.bytes_up == 2 * len(codec.encode({k: 0 * v for k, v in message.items()}, 0.0))


def test_a_clients_deltas_are_taken_from_its_own_part() -> None:
    """Idle clients that each hold a part of the model send zeros, and the server adds what that client was told."""
    clients, model, downlink = classification_clients((4, 8, 5)), fp.models.mlp(4, (6,), 3), Sparse("int4")
    codec = Sparse("int8", "zlib")
    made = fp.Algorithm(priors.Dropout(), Idle(), codec=codec, downlink=downlink, delta=True)
    result = fp.run(made, model, clients, rounds=1)
    prior = result.algorithm.prior
    before = prior.init({k: p.detach() for k, p in model.named_parameters()})
    told, holders = tree.map(torch.zeros_like, before.mean), tree.map(torch.zeros_like, before.mean)
    for client in clients:
        sent = tree.flatten(prior.sample(before, generator(0, 1, client.index, "downlink")))
        eta = tree.unflatten(before, downlink.decode(downlink.encode(sent, 0.0), schema_of(sent))[0])
        told = tree.map(torch.add, told, eta.mean)
        held = structure.alive(prior.groups, eta.keep, eta.mean)
        holders = {k: v + held.get(k, 1.0) for k, v in holders.items()}
    assert not any(c.status != "ok" for c in result.history[0].clients)
    assert {float(v) for k in holders for v in holders[k].unique()} >= {1.0, 2.0}
    for name, w in before.mean.items():
        wanted = torch.where(holders[name] > 0, told[name] / holders[name].clamp(min=1), w)
        assert torch.allclose(result.eta.mean[name], wanted, rtol=1e-6, atol=1e-7)
    silent = codec.encode({f"phi/{k}": torch.zeros_like(v) for k, v in before.mean.items()}, 0.0)
    assert [c.bytes_up for c in result.history[0].clients] == [len(silent)] * len(clients)


def custom() -> fp.priors.Custom:
    return priors.Custom(lambda eta, phi: -0.5 * tree.total(tree.map(lambda w, p: (p - w) ** 2, eta.mean, phi)), 0.7)


NAMED = [
    fp.fedavg(0.1),
    fp.fedadam(0.1),
    fp.fedsparse(0.1, lambda_0=0.3, gate_lr=0.4),
    fp.fedsparse(0.1, density=0.3),
    fp.feddropout(0.1),
    replace(fp.fedprox(0.1), prior=custom()),
]


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("named", NAMED, ids=lambda a: f"{a.name}-{type(a.prior).__name__}")
def test_a_run_with_deltas_is_the_run_without(named: fp.Algorithm, weighting: Any) -> None:
    """In float64, up to rounding; with units that fedsparse removes on the way."""
    clients = classification_clients((6, 5, 9), dtype=torch.float64)
    plain = replace(named, codec=type(named.codec)("float64"), weighting=weighting)
    etas = [
        fp.run(made, fp.models.mlp(4, (6,), 3).double(), clients, rounds=8, cohort=2).eta
        for made in (plain, replace(plain, delta=True))
    ]
    assert close(*map(tree.flatten, etas), 1e-9)


@pytest.mark.parametrize("case", [PRIORS[0], GATED[2]], ids=str)
def test_rounded_deltas_are_unbiased(case: Case) -> None:
    """An error lies within a step s and has a variance of at most s^2 / 4: the mean of K is within 4 s / (2 sqrt K)."""
    eta, count, weight = case.eta(), 400, 3.0
    stats = algorithm(case, Dense()).message(eta, case.posterior(case, generator(0, "q")))
    reference = wire.flat(algorithm(case, Dense()).reference(eta, stats))
    total = tree.map(torch.zeros_like, wire.flat(stats))
    for seed in range(count):
        made = algorithm(case, Dense("int4", seed=seed))
        total = tree.map(torch.add, total, wire.flat(arrived(made, eta, stats, weight)))
    rounded = 0
    for name, value in wire.flat(stats.weighted(weight)).items():
        error = (total[name] / count - value).abs()
        d = value - weight * reference[name] if name in reference else value
        step = d.abs().flatten(1).amax(1) / 7 if d.ndim > 1 else torch.zeros(len(d), dtype=d.dtype)
        assert (error <= 4 * step.view(-1, *[1] * (d.ndim - 1)) / (2 * math.sqrt(count)) + 1e-6).all()
        rounded += int((error > 1e-6).sum())
    assert rounded > 0


@pytest.mark.parametrize("value_type", ["int8", "int4", "int2"])
@pytest.mark.parametrize("case", [PRIORS[0], GATED[2], GATED[-1]], ids=str)
def test_near_convergence_a_rounded_delta_is_nearer(case: Case, value_type: str) -> None:
    """A step is proportional to what is sent: where phi is within 1/100 of w, the error is about 1/100."""
    eta = case.prior.init(case.params)
    eta = eta._replace(mean=normal(generator(0, "w"), case.params))
    q = case.posterior(case, generator(0, "q"))
    q = replace(q, phi={k: v + 0.01 * q.phi[k] for k, v in eta.mean.items()})

    def error(delta: bool) -> float:
        made = algorithm(case, Dense(value_type), delta=delta)
        stats = made.message(eta, q)
        difference = tree.map(torch.sub, wire.flat(arrived(made, eta, stats, 1.0)), wire.flat(stats))
        return math.sqrt(float(tree.dot(difference, difference)))

    assert 0 < error(True) < 0.05 * error(False)


MEANS = (priors.Gaussian, LearnedScale)  # over all clients, of a model that stays whole
LOSSY = [TopK(0.2), TopK(0.1, "int8", "zlib"), Dense("int4"), Sparse("int2"), Dense("bfloat16")]


@pytest.mark.parametrize("codec", LOSSY, ids=repr)
@pytest.mark.parametrize("case", [c for c in PRIORS if isinstance(c.prior, MEANS)], ids=str)
def test_feedback_telescopes(case: Case, codec: Any) -> None:
    """sum of decoded / weight + the last residual = sum of (t - r), exactly: values of few bits, weights 2^i."""
    case = replace(case, params={"w": torch.zeros(6, 5).double(), "b": torch.zeros(5).double()})
    made, residual, true, sent = algorithm(case, codec, feedback=True), {}, [], []
    for number, weight in enumerate((1.0, 4.0, 2.0, 2.0, 8.0)):
        eta = dyadic(case.eta(number))
        stats = made.message(eta, dyadic(case.posterior(case, generator(number, "q"))))
        payload, residual = wire.encode(made, eta, stats, weight, residual)
        got = wire.decode(made, eta, payload, schema_of(wire.flat(stats)))
        assert got.clients == weight
        reference = wire.flat(made.reference(eta, stats))
        true.append(tree.map(torch.sub, wire.flat(stats), reference))
        sent.append(tree.map(torch.sub, wire.flat(got.weighted(1 / weight)), reference))
    assert any(bool(v.any()) for v in residual.values())
    for name, left in residual.items():
        assert torch.equal(sum(s[name] for s in sent) + left, sum(d[name] for d in true))
