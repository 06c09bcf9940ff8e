"""Deltas: the server has what it would have had without them. Feedback: what a codec leaves out is sent later."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import PRIORS, Case, classification_clients, close, equal, normal
from fedprior import Client, Examples, Params, Stats, inference, posteriors, priors, tree, wire
from fedprior.codecs import Dense, Sparse, TopK, schema_of
from fedprior.objective import Objective
from fedprior.rng import generator
from fedprior.store import DiskStore
from stateful import Counting

GATED = [c for c in PRIORS if isinstance(c.prior, priors.SpikeSlab)]
CODECS = [Dense(), Dense("float64", "zlib"), Sparse(), Sparse("float64"), TopK(1.0), TopK(1.0, "float64")]
prior_cases = pytest.mark.parametrize("case", PRIORS, ids=str)


def algorithm(case: Case, codec: Any, **more: Any) -> fp.Algorithm:
    e_step = inference.Gated(0.1) if case in GATED else inference.Point(0.1)
    return fp.Algorithm(case.prior, e_step, codec=codec, downlink=Dense("float64"), **{"delta": True} | more)


def dyadic(value: Any) -> Any:
    """Multiples of 1/128 between -2 and 2 in all dicts of an eta or a posterior: few enough bits for exact products."""

    def rounded(params: Params) -> Params:
        return tree.map(lambda v: (v.clamp(-2, 2) * 128).round() / 128, params)

    if isinstance(value, tuple):
        return type(value)(*map(rounded, value))
    return replace(value, **{f.name: rounded(getattr(value, f.name)) for f in fields(value)})


def arrived(made: fp.Algorithm, eta: Any, stats: Stats, weight: float) -> Stats:
    payload, residual = wire.encode(made, eta, stats, weight)
    assert residual == {}
    return wire.decode(made, eta, payload, schema_of(wire.flat(stats)))


@prior_cases
@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_delta_arrives_as_the_plain_message(case: Case, codec: Any, weight: float) -> None:
    """With values of so few bits that nothing is rounded: not a bit of difference."""
    made, eta = algorithm(case, codec), dyadic(case.eta())
    stats = made.message(eta, dyadic(case.posterior(case, generator(0, "q"))))
    got, want = arrived(made, eta, stats, weight), stats.weighted(weight)
    assert got.clients == want.clients == weight and equal(wire.flat(got), wire.flat(want))
    assert list(wire.flat(got)) == list(wire.flat(want))


@prior_cases
def test_the_error_is_that_of_the_delta(case: Case) -> None:
    """Values of any bits: float64 up to its own rounding, float32 to 2^-24 of the difference, not of the value.

    SpikeSlab's reference z w is that of the gates as they arrive, and takes their rounding over.
    """
    eta, weight = case.eta(), 7.0
    stats = case.prior.stats(case.posterior(case, generator(0, "q"))).only(case.prior.uplink)
    want = wire.flat(stats.weighted(weight))
    assert close(wire.flat(arrived(algorithm(case, Dense("float64")), eta, stats, weight)), want, 1e-14)
    made = algorithm(case, Dense())
    got, reference = wire.flat(arrived(made, eta, stats, weight)), wire.flat(made.reference(eta, stats))
    for name, value in want.items():
        r = weight * reference.get(name, torch.zeros_like(value))
        rounded = (value - r).abs() + (r.abs() if case in GATED else 0)
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


def custom() -> fp.priors.Custom:
    return priors.Custom(lambda eta, phi: -0.5 * tree.total(tree.map(lambda w, p: (p - w) ** 2, eta.mean, phi)), 0.7)


NAMED = [fp.fedavg(0.1), fp.fedadam(0.1), fp.fedsparse(0.1, 0.3, 0.4), replace(fp.fedprox(0.1), prior=custom())]


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


LOSSY = [TopK(0.2), TopK(0.1, "int8", "zlib"), Dense("int4"), Sparse("int2"), Dense("bfloat16")]


@pytest.mark.parametrize("codec", LOSSY, ids=repr)
@pytest.mark.parametrize("case", [c for c in PRIORS if c not in GATED], ids=str)
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


def beznosikov(client: int) -> Client:
    """Examples whose mean loss is f(x) = <a, x>^2 + |x|^2 / 4, with a = (2, 2, 2) but for a_client = -3."""
    a = torch.full((3,), 2.0, dtype=torch.float64)
    a[client] = -3
    rows = torch.cat([math.sqrt(8) * a[None], math.sqrt(2) * torch.eye(3, dtype=torch.float64)])
    return Client(client, f"client-{client}", Examples(rows, torch.zeros(4, 1, dtype=torch.float64)))


def test_plain_top_1_diverges_where_feedback_converges() -> None:
    """Beznosikov et al. 2020, arXiv:2002.12410, example 1: f_1 + f_2 + f_3 is convex, with its minimum at 0.

    At x = (c, c, c) a client's gradient is c (4.5, 4.5, 4.5) but for -5.5 c in its own coordinate, which is all that
    top-1 sends. The mean of the three steps is + lr 5.5 c / 3 in each coordinate: away from 0, by the same factor every
    round. The gradient of the mean is 7/6 c in each, so that full steps shrink x by 1 - lr 7/6.
    """
    lr, rounds, model = 0.01, 400, nn.Linear(3, 1, bias=False).double()
    nn.init.ones_(model.weight)
    e_step, clients = inference.Point(lr, 1, None), [beznosikov(i) for i in range(3)]

    def run(**fields: Any) -> torch.Tensor:
        made = fp.Algorithm(priors.Gaussian(), e_step, downlink=Dense("float64"), delta=True, **fields)
        return fp.run(made, model, clients, rounds=rounds, loss="regression").params["weight"][0]

    top_1 = TopK(0.3, "float64")
    plain, mended, full = run(codec=top_1), run(codec=top_1, feedback=True), run(codec=Dense("float64"))
    one = torch.ones(3, dtype=torch.float64)
    assert torch.allclose(plain, (1 + lr * 5.5 / 3) ** rounds * one, rtol=1e-9, atol=0)
    assert torch.allclose(full, (1 - lr * 3.5 / 3) ** rounds * one, rtol=1e-9, atol=0)
    assert plain.min() > 1000 and full.max() < 0.01 and mended.abs().max() < 0.1


CLIENTS = classification_clients((6, 5, 7))


@dataclass(frozen=True)
class InTransit:
    """An engine on whose line the payload of client 1 is damaged, in the rounds named."""

    rounds: tuple[int, ...]

    def map_sum(self, work, indices):
        uploads = [work.client(i) for i in indices]
        if work.number in self.rounds:
            uploads[1] = replace(uploads[1], payload=uploads[1].payload[:-1])
        received = [stats for stats in map(work.receive, uploads) if stats is not None]
        return sum(received[1:], received[0])


def personal(**fields: Any) -> fp.Algorithm:
    fields = {"codec": TopK(0.2), "delta": True, "feedback": True, "weighting": "examples"} | fields
    return fp.Algorithm(priors.Gaussian(), Counting(inference.Point(0.1, 1, 4)), downlink=Dense(), **fields)


def states(folder: Path, **fields: Any) -> list[Params]:
    fp.run(personal(), fp.models.mlp(4, (6,), 3), CLIENTS, out=folder, **fields)
    loaded = [DiskStore(folder / "clients").load(i) for i in range(len(CLIENTS))]
    return [state for state in loaded if state is not None]


def test_a_residual_lives_beside_the_state_of_the_e_step(tmp_path: Path) -> None:
    for state in states(tmp_path, rounds=3):
        residual = wire.part(state, "residual")
        assert wire.part(state, "e_step") == {"rounds": 3} and residual is not None
        assert set(residual) == {f"phi/{k}" for k in Objective(fp.models.mlp(4, (6,), 3)).params()}
        for name, value in residual.items():  # vectors are sent whole, and weighted: what is left is a rounding
            assert (float(value.abs().max()) > 1e-3) == name.endswith("weight")
        again = wire.join({"e_step": wire.part(state, "e_step"), "residual": residual})
        assert equal(again, state)
    assert wire.part({"e_step/rounds": torch.ones(1)}, "residual") is None and wire.join({"e_step": None}) == {}


def test_a_refused_upload_leaves_the_personal_state_as_it_was(tmp_path: Path) -> None:
    """Whether or not the client could have known; the states of the others go on."""
    before = states(tmp_path / "one", rounds=1)
    after = states(tmp_path / "two", rounds=2, engine=InTransit((2,)))
    whole = states(tmp_path / "whole", rounds=2)
    assert [equal(a, b) for a, b in zip(after, before, strict=True)] == [False, True, False]
    assert [equal(a, b) for a, b in zip(after, whole, strict=True)] == [True, False, True]
    assert len(states(tmp_path / "none", rounds=1, engine=InTransit((1,)))) == 2


def test_a_client_that_cannot_decode_its_own_payload_is_refused(tmp_path: Path) -> None:
    """NaN in the data, with feedback: the server says why, and there is no state."""
    x = CLIENTS[1].train.x.clone()
    x[0, 0] = math.nan
    sick = [CLIENTS[0], Client(1, "sick", Examples(x, CLIENTS[1].train.y)), CLIENTS[2]]
    result = fp.run(personal(), fp.models.mlp(4, (6,), 3), sick, rounds=2, out=tmp_path)
    assert [c.client for r in result.history for c in r.lost()] == ["sick", "sick"]
    assert DiskStore(tmp_path / "clients").load(1) is None


WRONG = [
    ({"codec": TopK(0.1)}, "downlink=Dense"),
    ({"codec": TopK(0.1), "downlink": Dense()}, "delta=True"),
    ({"downlink": TopK(0.1), "delta": True}, "downlink=Dense"),
    ({"feedback": True}, "delta=True as well"),
    ({"feedback": True, "delta": True, "prior": priors.SpikeSlab(0.1)}, "SpikeSlab are over the clients whose gates"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_combinations_that_would_train_nothing_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.Algorithm(**{"prior": priors.Gaussian(), "inference": inference.Point(0.1)} | more)
    with pytest.raises(TypeError, match=r"downlink=.*is not a Codec"):
        fp.Algorithm(priors.Gaussian(), inference.Point(0.1), downlink=Dense)  # type: ignore[arg-type]


def test_the_wire_is_part_of_an_algorithms_identity() -> None:
    """So that a run is not resumed with another one."""
    base = replace(fp.topk(), feedback=False)
    others = [replace(base, **f) for f in ({"feedback": True}, {"downlink": Sparse()}, {"codec": TopK(0.2)})]
    plain = replace(fp.fedavg(), name="topk")
    assert len({str(a) for a in (base, *others, plain, replace(plain, delta=True))}) == 6
