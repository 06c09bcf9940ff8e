"""The spike-and-slab prior against its generative story: densities, loops and enumeration of all gates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from cases import (
    MLP,
    PRIORS,
    VECTORS,
    Case,
    close,
    drawn_gates,
    everywhere,
    expected_gates,
    normal,
    parameters_left,
    total,
)
from coupled_nets import Branches, OneLayerBlock, Residual
from fedprior import Params, gates, posteriors, priors, structure, tree
from fedprior.core import Stats
from fedprior.objective import Objective
from fedprior.priors import SpikeSlab
from fedprior.rng import generator

SLABS = [c for c in PRIORS if isinstance(c.prior, SpikeSlab) and c.posterior is expected_gates]


def tiny(model, x: Tensor, name: str) -> Case:
    prior = SpikeSlab(0.4, 2.0).bind(model, x)
    return Case(name, prior, Objective(model).params(), expected_gates)


TINY = [
    tiny(MLP, VECTORS, "mlp"),
    tiny(Residual(2, 2).double(), torch.zeros(1, 1, 6, 6, dtype=torch.float64), "residual"),
    tiny(OneLayerBlock(3).double(), VECTORS, "one-layer-block"),
    tiny(Branches(2, 1, 2).double(), torch.zeros(1, 1, 6, 6, dtype=torch.float64), "branches"),
]


def all_gates(case: Case) -> Iterator[Params]:
    """Every z in {0, 1}^units."""
    sizes = [g.units for g in case.prior.groups]
    for bits in itertools.product([0.0, 1.0], repeat=sum(sizes)):
        parts = torch.tensor(bits, dtype=torch.float64).split(sizes)
        yield {g.name: part for g, part in zip(case.prior.groups, parts, strict=True)}


def held_by(case: Case, readers: bool = True) -> dict[str, Tensor]:
    """For each parameter, entry -> the units that own it (or read it), as a (units, *shape) mask; a plain loop."""
    units = [(g.name, u) for g in case.prior.groups for u in range(g.units)]
    mask = {k: torch.zeros(len(units), *v.shape, dtype=torch.bool) for k, v in case.params.items()}
    for group in case.prior.groups:
        for m in (m for m in group.members if m.out or readers):
            for position, unit in enumerate(m.unit):
                if unit >= 0:
                    mask[m.name][units.index((group.name, unit))].select(m.dim, position)[...] = True
    return mask


def live(case: Case, z: Params, readers: bool = True) -> Params:
    """1 for the entries of which no owner (and no unit that they read) is closed, else 0."""
    flat = torch.cat([z[g.name] for g in case.prior.groups])
    return {
        k: 1.0 - (m & (flat == 0).view(-1, *[1] * (m.ndim - 1))).any(0).double()
        for k, m in held_by(case, readers).items()
    }


def test_lambda_0_is_the_log_ratio_of_the_two_normalisers() -> None:
    """At their modes the spike's log-density exceeds the slab's by (1/2) log(spike_precision / precision)."""
    slab, spike = (Normal(torch.zeros((), dtype=torch.float64), precision**-0.5) for precision in (2.0, 500.0))
    zero = torch.zeros((), dtype=torch.float64)
    prior = SpikeSlab.from_precisions(2.0, 500.0, keep=0.5)
    assert prior.lambda_0 == pytest.approx(float(spike.log_prob(zero) - slab.log_prob(zero)), abs=1e-12)
    assert (prior.precision, prior.keep) == (2.0, 0.5)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_log_prob_is_the_densities_of_the_story(case: Case) -> None:
    """For every z: sum_j log N(phi_j; slab or spike) + sum_g log Bernoulli(z_g; theta_g), up to one constant."""
    precision, spike_precision = 2.0, 300.0
    prior = replace(SpikeSlab.from_precisions(precision, spike_precision), groups=case.prior.groups)
    rng = generator(0, "story")
    w, phi = normal(rng, case.params), normal(rng, case.params)
    theta = {g.name: 0.2 + 0.6 * torch.rand(g.units, generator=rng, dtype=torch.float64) for g in prior.groups}
    eta, differences = prior.Eta(w, theta), []
    for z in all_gates(case):
        story = torch.zeros((), dtype=torch.float64)
        for name, on in live(case, z, readers=False).items():
            slab = Normal(w[name], precision**-0.5).log_prob(phi[name])
            spike = Normal(torch.zeros_like(phi[name]), spike_precision**-0.5).log_prob(torch.zeros_like(phi[name]))
            story = story + torch.where(on == 1, slab, spike).sum()
        story = story + sum(Bernoulli(theta[g]).log_prob(z[g]).sum() for g in z)
        differences.append(prior.log_prob(eta, prior.stats(posteriors.Gated(phi, z, z))) - story)
    spread = torch.stack(differences)
    assert (spread - spread[0]).abs().max() < 1e-9


@pytest.mark.parametrize("case", TINY, ids=str)
def test_statistics_of_expected_gates_are_the_expectation_over_gates(case: Case) -> None:
    """E over all z ~ Bernoulli(pi), in a net whose entries have owners and readers."""
    rng = generator(1, "expectation")
    q = expected_gates(case, rng)
    assert max(int(m.sum(0).max()) for m in held_by(case).values()) == 2
    want, mass = None, 0.0
    for z in all_gates(case):
        p = math.exp(sum(float(Bernoulli(q.keep[g]).log_prob(z[g]).sum()) for g in z))
        stats = case.prior.stats(posteriors.Gated(q.phi, z, z)).weighted(p)
        want, mass = stats if want is None else want + stats, mass + p
    assert mass == pytest.approx(1, abs=1e-12)
    got = case.prior.stats(q)
    assert got.clients == pytest.approx(want.clients)
    for term, params in got.terms.items():
        full = {k: v.expand_as(want[term][k]) for k, v in params.items()}
        assert close(full, dict(want[term])), term
    eta = case.eta()
    assert torch.allclose(case.prior.log_prob(eta, got), case.prior.log_prob(eta, want), rtol=1e-12)


@pytest.mark.parametrize("removed", [0, 1], ids=["whole", "one-removed"])
@pytest.mark.parametrize("case", SLABS, ids=str)
def test_each_term_of_log_prob_against_a_loop(case: Case, removed: int) -> None:
    """Two clients of weights 1 and 2.5; one Python number at a time. What a removed unit held has no price."""
    on = {g: (torch.arange(len(k)) >= removed).double() for g, k in case.eta().keep.items()}
    eta = case.eta()._replace(keep=tree.map(torch.mul, case.eta().keep, on))
    clients = []
    for seed, weight in ((0, 1.0), (1, 2.5)):
        q = case.posterior(case, generator(seed, "q"))
        pi = tree.map(torch.mul, q.keep, on)
        clients.append((posteriors.Gated(q.phi, pi, pi), weight))
    there = live(case, on)
    entropy = price = squares = 0.0
    for q, weight in clients:
        for g, pi in q.keep.items():
            for p, theta in zip(pi.tolist(), eta.keep[g].tolist(), strict=True):
                entropy += weight * (p * math.log(theta) + (1 - p) * math.log(1 - theta)) if theta else 0.0
        pi = torch.cat([q.keep[g.name] for g in case.prior.groups])
        for name, mask in held_by(case, readers=False).items():
            phi, w, owners = q.phi[name].flatten().tolist(), eta.mean[name].flatten().tolist(), mask.flatten(1)
            for j, (a, b, alive) in enumerate(zip(phi, w, there[name].flatten().tolist(), strict=True)):
                z = math.prod(pi[owners[:, j]].tolist())
                price += weight * z * alive * bool(owners[:, j].any())  # an entry that no unit owns has no price
                squares += weight * z * (a - b) ** 2
    want = entropy - case.prior.lambda_0 * price - case.prior.precision / 2 * squares
    got = case.prior.log_prob(eta, total([case.prior.stats(q).weighted(w) for q, w in clients]))
    assert float(got) == pytest.approx(want, rel=1e-11)
    assert min(abs(entropy), price, squares) > 0.1


@pytest.mark.parametrize("case", TINY, ids=str)
def test_parameters_left_is_what_a_mask_leaves(case: Case) -> None:
    for z in all_gates(case):
        eta = case.prior.Eta(case.params, {g: 0.5 * k for g, k in z.items()})
        want = sum(int(on.sum()) for on in live(case, z).values())
        assert parameters_left(case.prior, eta) == want
    assert parameters_left(case.prior, case.eta()) == tree.size(case.params)


def random_total(case: Case, eta, rng: torch.Generator) -> Stats:
    """Drawn gates of three clients that leave removed units closed, as the E-step does."""
    clients = []
    for _ in range(3):
        q = drawn_gates(case, rng)
        low = {g: (k**1.5) * (eta.keep[g] > 0) for g, k in q.keep.items()}
        gate = {g: (torch.rand(k.shape, generator=rng, dtype=k.dtype) < k).to(k) for g, k in low.items()}
        clients.append(case.prior.stats(posteriors.Gated(q.phi, low, gate)))
    return total(clients)


@pytest.mark.parametrize("case", SLABS, ids=str)
def test_removed_units_stay_removed(case: Case) -> None:
    """Many rounds of random statistics: zeros for good, the last unit of a group stays, theta is clamped."""
    prior = replace(case.prior, threshold=0.3, clamp=0.01)
    case, rng = case.with_prior(prior), generator(0, "rounds")
    eta, removed, left = case.eta(), {g.name: torch.zeros(g.units, dtype=torch.bool) for g in prior.groups}, []
    for _ in range(40):
        eta = prior.project(prior.m_step(eta, random_total(case, eta, rng)))
        for name, theta in eta.keep.items():
            assert not theta[removed[name]].any() and (theta > 0).any()
            removed[name] = theta == 0
            assert ((theta == 0) | ((theta >= 0.01) & (theta <= 0.99))).all()
            assert (theta > 0).sum() == 1 or ((theta == 0) | (theta >= 0.3)).all()
        on = live(case, {g: (k > 0).double() for g, k in eta.keep.items()})
        assert all(not v[on[k] == 0].any() and v[on[k] == 1].any() for k, v in eta.mean.items())
        left.append(parameters_left(prior, eta))
    assert left == sorted(left, reverse=True) and left[-1] < tree.size(case.params)
    assert all(int((k > 0).sum()) == 1 for k in eta.keep.values())


def test_project_clamps_and_keeps_the_best() -> None:
    case = SLABS[0]
    prior = replace(case.prior, threshold=0.1, clamp=0.001)
    first, second = (torch.tensor(v, dtype=torch.float64) for v in ([0.05, 0.0999, 0.1], [0.02, 0.03]))
    eta = prior.project(prior.Eta(case.params, dict(zip(prior.init(case.params).keep, (first, second), strict=True))))
    assert [k.tolist() for k in eta.keep.values()] == [[0, 0, 0.1], [0, 0.1]]
    ones = {g: torch.ones_like(k) for g, k in eta.keep.items()}
    eta = prior.project(prior.Eta(case.params, ones))
    assert all((k == 0.999).all() for k in eta.keep.values())
    assert all(torch.equal(prior.project(eta).keep[g], k) for g, k in eta.keep.items())


def test_a_step_that_overshoots_does_not_bring_back_removed_units() -> None:
    """A server step with momentum can take theta below 0; the best unit is then still a live one."""
    case = SLABS[0]
    thetas = dict(zip(case.eta().keep, ([0.0, -0.05, -0.1], [0.5, 0.5]), strict=True))
    eta = case.eta()._replace(keep={g: torch.tensor(v, dtype=torch.float64) for g, v in thetas.items()})
    before = case.eta()._replace(keep={g: (v != 0).to(v) for g, v in eta.keep.items()})
    (first, _) = case.prior.project(eta, before).keep.values()
    assert first[0] == 0 and first[1] > 0


def test_a_client_cannot_bring_back_removed_units() -> None:
    """Whatever an upload says of a removed unit, its theta and its weights stay 0."""
    case = SLABS[0]
    before = case.prior.project(
        case.eta()._replace(keep={g: v * (torch.arange(len(v)) > 0) for g, v in case.eta().keep.items()})
    )
    after = case.prior.project(case.eta(), before)
    assert all(theta[0] == 0 and (theta[1:] > 0).all() for theta in after.keep.values())
    assert parameters_left(case.prior, after) == parameters_left(case.prior, before)


def test_point_closes_removed_units() -> None:
    """The model that is evaluated gives what the model without the removed units gives."""
    case = TINY[0]
    eta = case.eta()
    eta = case.prior.project(eta._replace(keep={g: k * (torch.arange(len(k)) != 1) for g, k in eta.keep.items()}))
    assert parameters_left(case.prior, eta) < tree.size(eta.mean)
    point, units = case.prior.point(eta), case.prior.groups
    closed = {g: gates.at_test_time(k) for g, k in eta.keep.items()}
    assert all((z[eta.keep[g] == 0] == 0).all() and (z[eta.keep[g] > 0.5] > 0).all() for g, z in closed.items())
    for name, on in everywhere(structure.alive(units, eta.keep, point), point).items():
        assert not point[name][on == 0].any()
    for name, z in everywhere(structure.owned(units, closed, point), point).items():
        assert torch.allclose(point[name], z * eta.mean[name], rtol=1e-12)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_the_price_counts_what_is_really_there(case: Case) -> None:
    """|g| by counting, for every set of removed units: entries that a unit owns and that read no removed unit."""
    owners, units = held_by(case, readers=False), [(g.name, u) for g in case.prior.groups for u in range(g.units)]
    for z in all_gates(case):
        on = live(case, z)
        want = [sum(int(on[k][mask[i]].sum()) for k, mask in owners.items()) for i in range(len(units))]
        sizes = structure.sizes(case.prior.groups, z, case.params)
        for (name, unit), count in zip(units, want, strict=True):
            assert int(sizes[name][unit]) == count or z[name][unit] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lambda_0": float("nan")}, "lambda_0"),
        ({"lambda_0": 0.1, "precision": -1.0}, "precision"),
        ({"lambda_0": 0.1, "clamp": 0.6}, "clamp"),
        ({"lambda_0": 0.1, "threshold": 0.9, "keep": 0.5}, "threshold"),
        ({"lambda_0": 0.1, "keep": 1.0}, "keep"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikeSlab(**fields)


def test_a_posterior_without_gates_is_refused() -> None:
    with pytest.raises(TypeError, match=r"inference\.Gated"):
        TINY[0].prior.stats(posteriors.Point(TINY[0].params))
    with pytest.raises(ValueError, match="precision"):
        priors.Gaussian(-1.0)
