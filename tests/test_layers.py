"""Layers between uploads and their sum, in whole rounds: secure aggregation, privacy, robust rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fedprior as fp
from cases import classification_clients, close, equal, without_seconds
from fedprior import engines, posteriors, robust, tree, wire
from fedprior.budget import Budget
from fedprior.codecs import Dense, schema_of
from fedprior.engines.stacked import Stacked
from fedprior.layer import Setting
from fedprior.privacy import Privacy, SecureSum, clipping, shamir
from fedprior.privacy.sealed import Sealed
from fedprior.records import ClientRecord
from fedprior.rng import generator

CLIENTS = classification_clients((8, 9, 14, 7, 6, 11, 20, 5, 9))
MODEL = fp.models.mlp(4, (6,), 3)
pytestmark = pytest.mark.filterwarnings("ignore::fedprior.privacy.NoiseWarning")  # nine clients alone
PLAIN = fp.fedavg(0.1, weighting="uniform")
SECURE = replace(PLAIN, secure=SecureSum())


def go(algorithm: fp.Algorithm, rounds: int = 3, **fields: Any) -> fp.Result:
    chosen: dict[str, Any] = {"engine": engines.Sequential()} | fields
    return fp.run(algorithm, MODEL, CLIENTS, rounds=rounds, **chosen)


def record(index: int, status: Any = "ok") -> ClientRecord:
    return ClientRecord(index, f"client-{index}", status, 1, 0, 0, 0.0)


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_the_unmasked_sum_is_the_plain_sum_of_the_rounded_values(gone: int) -> None:
    params = dict(MODEL.named_parameters())
    algorithm = SECURE
    eta, _ = algorithm.start({k: v.detach() for k, v in params.items()})
    schema = schema_of(wire.flat(algorithm.message(eta, algorithm.inference.start(algorithm.prior, eta))))
    ids = [3, 5, 8, 13, 21, 34, 55, 89, 144]
    sealed = Sealed.begin(Setting(algorithm, schema, len(ids), 0), 1, eta, 0.0, dict.fromkeys(ids, ""))
    total, want = None, None
    for index in ids[gone:]:
        rng = generator(0, index, "phi")
        phi = {k: v + torch.randn(v.shape, generator=rng) for k, v in algorithm.prior.point(eta).items()}
        stats = algorithm.message(eta, posteriors.Point(phi))
        arrived = sealed.open(sealed.seal(eta, stats, 1.0, index))
        total = arrived if total is None else total + arrived
        message, _ = wire.difference(algorithm, eta, stats)
        scale = {k: sealed.layout.fixed.scale(4.0) for k in message}
        rounded = {k: torch.round(v.double() * scale[k]) / scale[k] for k, v in message.items()}
        want = rounded if want is None else {k: want[k] + v for k, v in rounded.items()}
    records = [record(i, "ok" if i in ids[gone:] else "dropped") for i in ids]
    done = sealed.finish(eta, total, records)
    assert done.total is not None and want is not None
    assert done.total.clients == len(ids) - gone
    exact = wire.restored(algorithm, eta, wire.unflat({k: v.float() for k, v in want.items()}, len(ids) - gone))
    assert equal(wire.flat(done.total), wire.flat(exact))


def test_a_sum_of_too_few_is_not_unmasked_and_the_run_goes_on() -> None:
    result = go(SECURE, rounds=1, availability=fp.Availability(dropout=0.9))
    answered = sum(c.status == "ok" for c in result.history[0].clients)
    assert answered < 6  # of 9, two thirds are needed
    assert "needed to unmask" in result.history[0].kept_eta
    assert equal(result.params, {k: v.detach() for k, v in MODEL.named_parameters()})


@pytest.mark.parametrize("weighting, most", [("uniform", 1.0), ("examples", 20.0)])
def test_a_secure_run_is_the_plain_run_up_to_rounding(weighting: Any, most: float) -> None:
    plain = go(replace(PLAIN, weighting=weighting))
    secure = go(replace(PLAIN, weighting=weighting, secure=SecureSum(most=most)))
    assert close(secure.params, plain.params, 1e-4)
    assert not equal(secure.params, plain.params)  # or nothing was rounded
    assert all(r.layer["within"] == 1 for r in secure.history)


@pytest.mark.parametrize("bound, told", [(4.0, False), (1e-4, True)])
def test_a_bound_that_cuts_off_what_clients_say_is_warned_of(bound: float, told: bool) -> None:
    """But not of a private sum, whose share within C is what C follows."""
    result = go(replace(PLAIN, secure=SecureSum(bound)))
    assert [r.layer["within"] for r in result.history] == [0.0 if told else 1.0] * 3
    assert ("100% of the clients had values beyond the bound" in result.summary()) == told
    private = Privacy(noise_multiplier=0.0, delta=0.01, clip=1e-4, quantile=0.5, clip_rate=1e-6)
    assert "beyond the bound" not in go(replace(PLAIN, secure=SecureSum(), privacy=private)).summary()


def test_a_bound_is_what_is_written_else_the_priors_else_four() -> None:
    gates, plain, named = fp.fedsparse().prior, PLAIN.prior, SecureSum({"phi": 1.0})
    assert [SecureSum().bound_of(term, gates) for term in ("phi", "gain")] == [4.0, 1e4]
    assert [SecureSum(2.0).bound_of(term, gates) for term in ("phi", "gain")] == [2.0, 2.0]
    assert [named.bound_of(term, gates) for term in ("phi", "gain")] == [1.0, 1e4]
    assert SecureSum().bound_of("phi", plain) == 4.0
    with pytest.raises(ValueError, match="no bound for the term 'psi', only for phi"):
        named.bound_of("psi", plain)


def test_workers_seal_alike() -> None:
    one, many = go(SECURE), go(SECURE, engine=engines.Workers(2))
    assert equal(one.params, many.params)
    assert without_seconds(one.history) == without_seconds(many.history)


def test_all_bytes_of_the_protocol_are_counted() -> None:
    n, words = len(CLIENTS), sum(p.numel() for p in MODEL.parameters()) + 2  # with the weight and `within`
    index, keys, tag, header, both = 4, 64, 16, 16, 2 * shamir.SHARE_BYTES
    boxes = (n - 1) * (index + both + tag)
    plain = go(PLAIN, rounds=1).history[0]
    secure = go(SECURE, rounds=1).history[0]
    request = 8 + n * index
    for a, b in zip(secure.clients, plain.clients, strict=True):
        assert a.bytes_up == keys + boxes + header + 4 * words + n * shamir.SHARE_BYTES
        assert a.bytes_down == b.bytes_down + n * (index + keys) + boxes + request


def test_fedsparse_stays_small_under_masks() -> None:
    """Entries of removed units are not sent, and what is removed is what an open run removes."""
    model = fp.models.mlp(4, (40,), 3)
    sparse = replace(fp.fedsparse(lr=0.1, density=0.3), weighting="uniform")
    hidden = replace(sparse, secure=SecureSum(bound={"phi": 4.0, "gain": 1e4, "clients": 1.0}))
    a, b = (fp.run(x, model, CLIENTS, rounds=6, engine=engines.Sequential()) for x in (sparse, hidden))
    assert [r.parameters_left for r in a.history] == [r.parameters_left for r in b.history]
    assert close(a.params, b.params, 1e-3)
    saved = b.history[0].bytes_up - b.history[-1].bytes_up
    units = (a.history[0].parameters_left - a.history[-1].parameters_left) // 8  # 4 weights in, a bias, 3 weights out
    assert units > 0
    assert saved == len(CLIENTS) * 4 * units * (8 + 1)  # and a gain


REFUSED = {
    "top-k": (lambda: replace(fp.topk(0.1), weighting="uniform", secure=SecureSum()), "TopK"),
    "own etas": (lambda: replace(fp.feddropout(0.1), secure=SecureSum()), "upload by itself"),
    "budget": (lambda: replace(SECURE, budget=Budget(1.0)), "budget"),
    "weights": (lambda: replace(fp.fedavg(0.1, weighting="examples"), secure=SecureSum()), "most="),
    "robust": (lambda: replace(SECURE, robust=robust.Median()), "robust"),
    "private weights": (lambda: replace(PLAIN, weighting="examples", privacy=Privacy(1.0)), "weighting='uniform'"),
    "no wish": (lambda: Privacy(), "target_epsilon"),
    "cohort": (lambda: go(SECURE, cohort=2), "cohort of 3"),
    "bits": (lambda: go(replace(PLAIN, secure=SecureSum(bits=8))), "bits must be one of"),
    "few bits": (
        lambda: replace(fp.fedsparse(weighting="uniform"), secure=SecureSum({"phi": 1.0}, bits=16)),
        "entries of gain of SharedGates",
    ),
    "delta": (lambda: go(replace(PLAIN, privacy=Privacy(1.0, delta=0.5))), "delta=0.5"),
    "one round too dear": (lambda: go(replace(PLAIN, privacy=Privacy(0.1, 0.5))), "give more noise"),
    "running means": (
        lambda: fp.run(
            replace(PLAIN, privacy=Privacy(1.0, delta=0.01)),
            torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)),
            CLIENTS,
            rounds=1,
        ),
        "GroupNorm",
    ),
    "stacked": (lambda: go(SECURE, engine=Stacked()), "one by one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_round_one(case: str) -> None:
    build, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize("name", fp.ALGORITHMS)
def test_16_bits_are_refused_for_terms_of_many_sizes_unless_a_bound_is_written(name: str) -> None:
    """Which those are the prior says, and a private sum has the clip as its bound."""
    made = replace(fp.ALGORITHMS[name](), weighting="uniform", codec=Dense(), downlink=Dense(), feedback=False)
    prior = made.prior
    if made.individual or not prior.uplink:
        return
    wide = {*getattr(prior, "bounds", {}), *getattr(prior, "precise", ())} & {*prior.uplink}
    if wide:
        with pytest.raises(ValueError, match=r"16 bits .* write SecureSum\(bits=32\)"):
            replace(made, secure=SecureSum(bits=16))
    for taken in (SecureSum(), SecureSum(1.0, bits=16), SecureSum(dict.fromkeys(prior.uplink, 1.0), bits=16)):
        assert replace(made, secure=taken).secure == taken
    assert wide or replace(made, secure=SecureSum(bits=16)).layered
    assert replace(made, secure=SecureSum(bits=16), privacy=Privacy(1.0)).layered


@pytest.mark.parametrize("length", [0.1, 1.0, 7.0])
def test_clipping_bounds_the_norm_and_keeps_the_direction(length: float) -> None:
    message = {"phi/a": torch.randn(5, generator=generator(0, "a")), "gain/b": torch.ones(2)}
    units = {"gain": 10.0}

    def norm(message: dict[str, torch.Tensor]) -> float:
        """Over the entries of all tensors, each in the unit of its term."""
        return float(torch.cat([message["phi/a"], message["gain/b"] / 10.0]).double().norm())

    factor = length / norm(message)
    message = {k: factor * v for k, v in message.items()}
    clipped, within = clipping.clip(message, 1.0, units)
    assert within == (norm(message) <= 1.0) and clipping.norm(message, units) == pytest.approx(norm(message))
    assert norm(clipped) <= 1.0
    ratios = torch.cat([clipped[k] / message[k] for k in message])
    assert torch.allclose(ratios, torch.full_like(ratios, min(1.0, 1 / length)), atol=1e-5)


@pytest.mark.parametrize("secure, more", [(None, 1.0), (SecureSum(), (9 / 6) ** 0.5)], ids=["central", "distributed"])
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_noise_has_its_deviation(secure: Any, more: float, quantile: float | None) -> None:
    """Clients that learn nothing: what is left is noise; if none drops out, (cohort / least)^(1/2) times too much."""
    still = replace(fp.fedavg(1e-12, weighting="uniform"), secure=secure)
    privacy = Privacy(noise_multiplier=0.8, delta=0.01, quantile=quantile).planned(1, 9, 9)
    model = fp.models.mlp(4, (60,), 3)
    result = fp.run(replace(still, privacy=privacy), model, CLIENTS, rounds=1)
    moved = tree.map(lambda a, b: a - b.detach(), result.params, dict(model.named_parameters()))
    noise = torch.cat([v.flatten() for v in moved.values()]).double()
    assert float(noise.std()) == pytest.approx(more * privacy.noise / 9, rel=4 / (2 * len(noise)) ** 0.5)


ROWS = torch.randn(10, 7, generator=generator(0, "rows"), dtype=torch.float64)


@pytest.mark.parametrize("rule", [robust.Median(), robust.TrimmedMean(0.2), robust.Krum(2, 5), robust.NormBound()])
@pytest.mark.parametrize("scale", [1e3, -1e3, 1e30])
def test_two_attackers_of_ten_cannot_move_a_robust_rule_far(rule: robust.Rule, scale: float) -> None:
    attacked = torch.cat([ROWS[:8], scale * ROWS[8:]])
    estimate, _ = rule.combine(attacked)
    low, high = ROWS.min(0).values, ROWS.max(0).values
    assert bool(((estimate >= low) & (estimate <= high)).all())
    plain, _ = robust.Mean().combine(attacked)
    assert not bool(((plain >= low) & (plain <= high)).all())


def test_the_mean_as_a_rule_is_the_plain_run() -> None:
    assert close(go(replace(PLAIN, robust=robust.Mean())).params, go(PLAIN).params, 1e-5)


@pytest.mark.parametrize("scale", [-1e3, -1.0, 1e3, 1e30])
def test_a_lie_moves_a_centred_mean_by_no_more_than_an_honest_client(scale: float) -> None:
    """A step adds terms of a norm r at most, of n: two liars move it by 2 r / n, whatever they say."""
    rule = robust.CentredClip(steps=1)
    estimate, why = rule.combine(torch.cat([ROWS[:8], scale * ROWS[8:]]))
    assert why == [""] * 10
    rows = torch.cat([ROWS[:8], scale * ROWS[8:]])
    centre, _ = robust.Median().combine(rows)
    lengths = (rows - centre).norm(dim=1)
    radius = float(lengths.quantile(0.5))
    want = centre.clone()
    for row, length in zip(rows, lengths.tolist(), strict=True):
        want = want + (row - centre) * min(1.0, radius / length) / 10
    assert torch.allclose(estimate, want)
    honest = centre + sum((row - centre) * min(1.0, radius / float((row - centre).norm())) for row in rows[:8]) / 10
    assert float((estimate - honest).norm()) <= 2 * radius / 10 * (1 + 1e-12)


def test_more_steps_of_a_centre_come_to_rest() -> None:
    """Where the clipped differences to it add up to nothing."""
    estimate, _ = robust.CentredClip(steps=200).combine(ROWS)
    further, _ = robust.CentredClip(steps=201).combine(ROWS)
    assert torch.allclose(estimate, further, atol=1e-9)
    assert not torch.allclose(estimate, robust.CentredClip(steps=1).combine(ROWS)[0], atol=1e-4)
    with pytest.raises(ValueError, match="steps >= 1"):
        robust.CentredClip(steps=0)


def test_a_bound_on_norms_drops_what_is_longer_and_keeps_a_flipped_sign() -> None:
    """Why the norm bound is no defence against lies of a possible size: (n - f - f) / n of the step is left."""
    row = ROWS[:1]
    flipped, why = robust.NormBound().combine(torch.cat([row.expand(8, -1), -row.expand(2, -1)]))
    assert torch.allclose(flipped, (10 - 2 - 2) / 10 * row[0]) and why == [""] * 10
    scaled, why = robust.NormBound().combine(torch.cat([row.expand(8, -1), -3 * row.expand(2, -1)]))
    assert torch.allclose(scaled, row[0]) and [bool(w) for w in why] == [False] * 8 + [True] * 2
