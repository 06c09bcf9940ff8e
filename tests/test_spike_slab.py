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

from cases import MLP, PRIORS, VECTORS, Case, close, drawn_gates, expected_gates, normal, total
from fedprior import Params, posteriors, priors, structure, tree
from fedprior.core import Stats
from fedprior.objective import Objective
from fedprior.priors import SpikeSlab
from fedprior.rng import generator
from test_structure import Branches, OneLayerBlock, Residual

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


def held_by(case: Case) -> dict[str, Tensor]:
    """For each parameter, entry -> the set of (group, unit) that hold it, as a (units, *shape) mask; a plain loop."""
    units = [(g.name, u) for g in case.prior.groups for u in range(g.units)]
    mask = {k: torch.zeros(len(units), *v.shape, dtype=torch.bool) for k, v in case.params.items()}
    for group in case.prior.groups:
        for m in group.members:
            for position, unit in enumerate(m.unit):
                if unit >= 0:
                    mask[m.name][units.index((group.name, unit))].select(m.dim, position)[...] = True
    return mask


def live(case: Case, z: Params) -> Params:
    """z_j of every entry: 1 while no unit that holds it is closed."""
    gates = torch.cat([z[g.name] for g in case.prior.groups])
    return {k: 1.0 - (m & (gates == 0).view(-1, *[1] * (m.ndim - 1))).any(0).double() for k, m in held_by(case).items()}


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
        for name, on in live(case, z).items():
            slab = Normal(w[name], precision**-0.5).log_prob(phi[name])
            spike = Normal(torch.zeros_like(phi[name]), spike_precision**-0.5).log_prob(torch.zeros_like(phi[name]))
            story = story + torch.where(on == 1, slab, spike).sum()
        story = story + sum(Bernoulli(theta[g]).log_prob(z[g]).sum() for g in z)
        differences.append(prior.log_prob(eta, prior.stats(posteriors.Gated(phi, z, z))) - story)
    spread = torch.stack(differences)
    assert (spread - spread[0]).abs().max() < 1e-9


@pytest.mark.parametrize("case", TINY, ids=str)
def test_statistics_of_expected_gates_are_the_expectation_over_gates(case: Case) -> None:
    """E over all z ~ Bernoulli(pi), entries held by two units included, whichever groups these are of."""
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


@pytest.mark.parametrize("case", SLABS, ids=str)
def test_each_term_of_log_prob_against_a_loop(case: Case) -> None:
    """Two clients of weights 1 and 2.5; one Python number at a time."""
    eta, clients = case.eta(), [(case.posterior(case, generator(s, "q")), w) for s, w in ((0, 1.0), (1, 2.5))]
    gates = price = squares = 0.0
    for q, weight in clients:
        for g, pi in q.keep.items():
            for p, theta in zip(pi.tolist(), eta.keep[g].tolist(), strict=True):
                gates += weight * (p * math.log(theta) + (1 - p) * math.log(1 - theta))
        pi = torch.cat([q.keep[g.name] for g in case.prior.groups])
        for name, mask in held_by(case).items():
            phi, w, holders = q.phi[name].flatten().tolist(), eta.mean[name].flatten().tolist(), mask.flatten(1)
            for j, (a, b) in enumerate(zip(phi, w, strict=True)):
                z = math.prod(pi[holders[:, j]].tolist())
                price += weight * z
                squares += weight * z * (a - b) ** 2
    want = gates - case.prior.lambda_0 * price - case.prior.precision / 2 * squares
    got = case.prior.log_prob(eta, total([case.prior.stats(q).weighted(w) for q, w in clients]))
    assert float(got) == pytest.approx(want, rel=1e-11)
    assert min(abs(gates), price, squares) > 1


@pytest.mark.parametrize("case", TINY, ids=str)
def test_parameters_left_is_what_a_mask_leaves(case: Case) -> None:
    for z in all_gates(case):
        eta = case.prior.Eta(case.params, {g: 0.5 * k for g, k in z.items()})
        want = sum(int(on.sum()) for on in live(case, z).values())
        assert case.prior.parameters_left(eta) == want
    assert case.prior.parameters_left(case.eta()) == tree.size(case.params)


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
        left.append(prior.parameters_left(eta))
    assert left == sorted(left, reverse=True) and left[-1] < tree.size(case.params)
    assert all(int((k > 0).sum()) == 1 for k in eta.keep.values())


def test_project_clamps_and_keeps_the_best() -> None:
    case = SLABS[0]
    prior = replace(case.prior, threshold=0.1, clamp=0.001)
    first, second = (torch.tensor(v, dtype=torch.float64) for v in ([0.05, 0.0999, 0.1], [0.02, 0.03]))
    eta = prior.project(prior.Eta(case.params, dict(zip(prior.init(case.params).keep, (first, second), strict=True))))
    assert [k.tolist() for k in eta.keep.values()] == [[0, 0, 0.1], [0, 0.03]]
    ones = {g: torch.ones_like(k) for g, k in eta.keep.items()}
    eta = prior.project(prior.Eta(case.params, ones))
    assert all((k == 0.999).all() for k in eta.keep.values())
    assert all(torch.equal(prior.project(eta).keep[g], k) for g, k in eta.keep.items())


def test_point_closes_removed_units() -> None:
    """The model that is evaluated gives what the model without the removed units gives."""
    case = TINY[0]
    eta = case.eta()
    eta = case.prior.project(eta._replace(keep={g: k * (torch.arange(len(k)) != 1) for g, k in eta.keep.items()}))
    assert case.prior.parameters_left(eta) < tree.size(eta.mean)
    point = case.prior.point(eta)
    z = structure.alive(case.prior.groups, {g: (k > 0).double() for g, k in eta.keep.items()}, point)
    assert all(not v[z[k].expand_as(v) == 0].any() for k, v in point.items())
    assert all(v[z[k].expand_as(v) == 1].all() for k, v in point.items())


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
    with pytest.raises(TypeError, match="inference.Gated"):
        TINY[0].prior.stats(posteriors.Point(TINY[0].params))
    with pytest.raises(ValueError, match="precision"):
        priors.Gaussian(-1.0)
