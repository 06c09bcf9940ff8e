"""The noise and the counted share of one round, whoever makes them: by deviations, and by plain counting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import pytest
import torch
from torch import Tensor

import fedprior as fp
from fedprior import inference, priors, structure, wire
from fedprior.codecs import schema_of
from fedprior.core import Eta, Stats
from fedprior.layer import Finished, Setting
from fedprior.privacy import Privacy, SecureSum
from fedprior.privacy.fixed_point import FixedPoint
from fedprior.records import ClientRecord

COHORT = 9
UNITS = {"gain": 100.0}
SPARSE = replace(fp.fedsparse(0.1, density=0.3), weighting="uniform")
MODEL = fp.models.mlp(4, (400,), 3)
ROUNDS = {"central": 200, "distributed": 40}
MADE = {"central": (None, 1.0), "distributed": (SecureSum(), (9 / 6) ** 0.5)}  # three more than must stay


def private(made: str, noise: float, **fields: Any) -> fp.Algorithm:
    privacy = Privacy(noise_multiplier=noise, delta=0.01, units=UNITS, **fields).planned(1, COHORT, COHORT)
    bound = replace(SPARSE, privacy=privacy, secure=MADE[made][0]).bind(MODEL, torch.zeros(1, 4))
    return replace(bound, prior=bound.prior.scheduled(3))  # type: ignore


def start(algorithm: fp.Algorithm) -> tuple[Eta, Stats]:
    """The first eta, and what a client says that learned nothing."""
    eta, _ = algorithm.start({k: v.detach() for k, v in MODEL.named_parameters()})
    return eta, algorithm.message(eta, algorithm.inference.start(algorithm.prior, eta))


def round_of(
    algorithm: fp.Algorithm,
    said: dict[int, Stats],
    eta: Eta,
    number: int = 1,
    weights: Sequence[float] = (1.0,) * COHORT,
) -> Finished:
    """A round in which these clients say that, and the others of the cohort fall silent before they do."""
    schema = schema_of(wire.flat(next(iter(said.values()))))
    stages = {i: "" if i in said else "masked" for i in range(COHORT)}
    server = algorithm.privacy.init() if algorithm.privacy else {}
    layer = Setting(algorithm, schema, COHORT, 0).layer(number, eta, server, stages)
    arrived = [
        layer.open(layer.seal(eta, stats, weights[i], i)) if layer.seals else layer.receive(eta, stats, "")
        for i, stats in said.items()
    ]
    status = {i: "ok" if i in said else "dropped" for i in range(COHORT)}
    records = [ClientRecord(i, f"client-{i}", status[i], 1, 0, 0, 0.0) for i in range(COHORT)]  # type: ignore
    return layer.finish(eta, reduce(add, arrived), records)


def noise_of(algorithm: fp.Algorithm, number: int = 1) -> dict[str, Tensor]:
    """Of each tensor, in a round in which nobody has learned anything."""
    eta, nothing = start(algorithm)
    done = round_of(algorithm, dict.fromkeys(range(COHORT), nothing), eta, number)
    assert done.total is not None
    noisy = wire.flat(done.total)
    return {k: (noisy[k] - COHORT * v).double() for k, v in wire.flat(nothing).items()}


@pytest.mark.parametrize("made", MADE)
def test_each_term_has_the_noise_of_its_unit_each_round_its_own_and_removed_units_none(made: str) -> None:
    """sigma = z C unit; the difference of two rounds has 2^(1/2) sigma, which one noise twice would not."""
    algorithm = private(made, 0.8, clip=0.3)
    left = algorithm.prior.live(start(algorithm)[0])
    rounds = [noise_of(algorithm, number) for number in (1, 2)]
    for term, unit in {"phi": 1.0, "gain": 100.0}.items():
        of_term = [[v.flatten() for k, v in noise.items() if k.startswith(f"{term}/")] for noise in rounds]
        first, second = map(torch.cat, of_term)
        sigma, error = MADE[made][1] * 0.8 * 0.3 * unit, 4 / (2 * len(first)) ** 0.5
        assert float(first.std()) == pytest.approx(sigma, rel=error)
        assert float((first - second).std()) == pytest.approx(2**0.5 * sigma, rel=error)
        assert term != "phi" or len(first) == left < sum(p.numel() for p in MODEL.parameters())


@pytest.mark.parametrize("made", MADE)
def test_of_an_eta_that_keeps_zeros_removed_units_have_no_noise(made: str) -> None:
    """Every other entry has."""
    prior = priors.GroupLasso(0.01).bind(MODEL, torch.zeros(1, 4))
    algorithm = replace(private(made, 0.8, clip=0.3), prior=prior, inference=inference.Point(0.1))
    eta, _ = start(algorithm)
    eta = prior.project(eta, eta._replace(keep={g: (z.cumsum(0) % 2) for g, z in eta.keep.items()}))
    sent = algorithm.message(eta, algorithm.inference.start(prior, eta))
    done = round_of(algorithm, dict.fromkeys(range(COHORT), sent), eta)
    assert done.total is not None
    alive = structure.alive(prior.groups, eta.keep, eta.mean)
    for name, mean in eta.mean.items():
        noise = done.total["phi"][name] - COHORT * mean
        assert torch.equal(noise != 0, (alive.get(name, torch.ones(())) > 0).expand_as(mean)), name
    assert any(not z.all() for z in alive.values())


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("answered", [6, 9])
def test_the_share_within_the_clip_counts_those_who_stay_away_as_halves(made: str, answered: int) -> None:
    """1/2 + sum over the others of (b_s - 1/2), over the cohort; what they say has norms of C / 2 and of 2 C."""
    algorithm = private(made, 0.0, clip=0.3, quantile=0.5)
    eta, nothing = start(algorithm)
    flat = wire.flat(nothing)
    key = next(k for k in flat if k.startswith("phi/"))
    said = {}
    for i in range(answered):
        step = torch.zeros_like(flat[key])
        step.view(-1)[i] = 0.15 if i < 2 else 0.6
        said[i] = wire.unflat(flat | {key: flat[key] + step}, 1.0)
    done = round_of(algorithm, said, eta)
    inside = 2
    assert done.info["within"] == pytest.approx(0.5 + (inside / 2 - (answered - inside) / 2) / COHORT, abs=1e-6)


@pytest.mark.parametrize("made", MADE)
def test_the_share_within_the_clip_has_the_noise_that_is_paid_for(made: str) -> None:
    """sigma_b = cohort / 20 in the sum, which is cohort times the share; here nobody is within C, and all are there."""
    algorithm = private(made, 0.5, clip=0.3, quantile=0.5)
    eta, nothing = start(algorithm)
    flat = wire.flat(nothing)
    said = dict.fromkeys(range(COHORT), wire.unflat({k: v + 1.0 for k, v in flat.items()}, 1.0))
    shares = torch.tensor(
        [round_of(algorithm, said, eta, n).info["within"] for n in range(1, ROUNDS[made] + 1)]
    ).double()
    sigma = MADE[made][1] / 20
    assert float(shares.mean()) == pytest.approx(0.0, abs=4 * sigma / len(shares) ** 0.5)
    assert float(shares.std()) == pytest.approx(sigma, rel=4 / (2 * len(shares)) ** 0.5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("answered", [6, 9])
def test_values_beyond_the_bound_are_cut_off_and_counted_on_both_sides(sign: int, answered: int) -> None:
    """One client says more than the bound 4, of which the sum has 4; the share is of those that answered."""
    algorithm = replace(fp.fedavg(0.1, weighting="uniform"), secure=SecureSum(bound=4.0))
    eta, nothing = start(algorithm)
    flat = wire.flat(nothing)
    sizes = [5.0 if i == 3 else 1.0 for i in range(answered)]
    said = {i: wire.unflat({k: v + sign * size for k, v in flat.items()}, 1.0) for i, size in enumerate(sizes)}
    done = round_of(algorithm, said, eta)
    assert done.total is not None and done.info["within"] == pytest.approx((answered - 1) / answered, abs=1e-6)
    for key, value in wire.flat(done.total).items():
        want = answered * flat[key] + sign * (answered - 1 + 4.0)
        assert torch.allclose(value, want, atol=1e-5), key


def test_a_client_of_more_examples_than_most_counts_as_most() -> None:
    algorithm = replace(fp.fedavg(0.1, weighting="examples"), secure=SecureSum(most=5.0))
    eta, nothing = start(algorithm)
    flat = wire.flat(nothing)
    said = {i: wire.unflat({k: v + i / 4 for k, v in flat.items()}, 1.0) for i in range(COHORT)}
    weights = [3.0, 5.0, 9.0, 5.5, 1.0, 100.0, 2.0, 4.0, 5.0]
    done = round_of(algorithm, said, eta, weights=weights)
    counted = [min(w, 5.0) for w in weights]
    assert done.total is not None and done.total.clients == pytest.approx(sum(counted), abs=1e-6)
    moved = sum(w * i / 4 for i, w in enumerate(counted))
    for key, value in wire.flat(done.total).items():
        assert torch.allclose(value, sum(counted) * flat[key] + moved, atol=1e-4), key


@pytest.mark.parametrize("steps", [50.0, 50.4, 50.6])
def test_what_is_clipped_stays_within_c_after_it_is_rounded(steps: float) -> None:
    """C is such that equal entries of norm C are so many steps of 16 bits: at 50.6 all are rounded up, beyond C."""
    entries = sum(p.numel() for p in MODEL.parameters())
    most = steps * entries**0.5 / 2**13
    privacy = Privacy(noise_multiplier=0.0, delta=0.01, clip=most).planned(1, COHORT, COHORT)
    plain = fp.fedavg(0.1, weighting="uniform")
    algorithm = replace(plain, privacy=privacy, secure=SecureSum(bits=16))
    assert FixedPoint(16, COHORT).scale(most) == 2**13
    eta, _ = algorithm.start({k: torch.zeros_like(v) for k, v in MODEL.named_parameters()})
    ones = wire.unflat({f"phi/{k}": torch.ones_like(v) for k, v in MODEL.named_parameters()}, 1.0)
    done = round_of(algorithm, dict.fromkeys(range(COHORT), ones), eta)
    assert done.total is not None
    norm = float(torch.cat([v.double().flatten() for v in wire.flat(done.total).values()]).norm()) / COHORT
    assert 0.97 * most < norm <= most


def test_masks_of_one_client_differ_between_rounds_and_between_clients() -> None:
    """The same words under two masks would tell what changed: no more of them are equal than by chance, 2^-32."""
    algorithm = replace(fp.fedavg(0.1, weighting="uniform"), secure=SecureSum())
    eta, nothing = start(algorithm)
    setting = Setting(algorithm, schema_of(wire.flat(nothing)), COHORT, 0)
    layers = [setting.layer(number, eta, {}, dict.fromkeys(range(COHORT), "")) for number in (1, 2)]
    sent = [layer.layout.unpack(layer.seal(eta, nothing, 1.0, i)) for layer in layers for i in (0, 1)]
    assert all(int((a == b).sum()) <= 1 for k, a in enumerate(sent) for b in sent[:k])
