"""The laws over the table of priors, and a proof that each law can fail: it catches a planted mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

import laws
from cases import (
    CONV,
    IMAGES,
    PRIORS,
    SPLITS,
    Case,
    bound,
    close,
    diagonal,
    drawn_gates,
    equal,
    everywhere,
    point,
    total,
)
from fedprior import priors, structure, tree
from fedprior.core import Stats
from learned_scale import LearnedScale


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", [*PRIORS, *SPLITS], ids=str)
def test_law(case: Case, law: Callable[[Case], None]) -> None:
    law(case)


def test_the_flat_limit_keeps_the_m_step() -> None:
    """At precision 0 log_prob says nothing; the M-step is that of every positive precision."""
    flat, curved = next(c for c in PRIORS if c.name == "gaussian-0"), priors.Gaussian(1e-6)
    stats = total(flat.with_prior(curved).clients())
    assert equal(flat.prior.m_step(flat.eta(), stats).mean, curved.m_step(flat.eta(), stats).mean)
    assert float(curved.log_prob(flat.eta(), stats)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("case", [c for c in PRIORS if isinstance(c.prior, priors.SpikeSlab)], ids=str)
def test_what_nobody_kept_stays(case: Case) -> None:
    """A unit closed at every client leaves its weights as they were; the others are the clients' means."""
    clients, first = [unit_0_closed(case, seed) for seed in range(4)], case.client(0)["gate"]
    gate = {g: (torch.arange(len(k)) > 0).double() for g, k in first.items()}
    eta = case.eta()
    new = case.prior.m_step(eta, total(clients).only(case.prior.uplink))
    kept = 0
    for name, z in everywhere(structure.owned(case.prior.groups, gate, eta.mean), eta.mean).items():
        w = eta.mean[name]
        assert torch.equal(new.mean[name][z == 0], w[z == 0])
        assert not (new.mean[name][z > 0] == w[z > 0]).any()
        kept += int((z == 0).sum())
    assert kept > 0


def unit_0_closed(case: Case, seed: int) -> Stats:
    """A client with unit 0 of every group closed and the other units open."""
    q = case.posterior(case, torch.Generator().manual_seed(seed))
    z = {g: torch.cat([k.new_zeros(1), k.new_ones(len(k) - 1)]) for g, k in q.keep.items()}
    return case.prior.stats(replace(q, gate=z))


def test_learned_scale_does_not_fall_below_its_floor() -> None:
    """Clients that agree leave no variance: the floor is what remains, and log_prob stays finite."""
    case = replace(next(c for c in PRIORS if c.name == "learned-scale"), prior=LearnedScale(floor=1e-2))
    stats = case.client(0).weighted(4)
    eta = case.prior.m_step(case.eta(), stats)
    assert all(torch.equal(v, torch.full_like(v, 1e-2)) for v in eta.var.values())
    assert torch.isfinite(case.prior.log_prob(eta, stats))


class MeanForSum(LearnedScale):
    """log_prob of the mean client instead of the sum over clients."""

    def log_prob(self, eta, t):
        return super().log_prob(eta, t) / t.clients


class WrongDivisor(LearnedScale):
    """An unbiased-looking n - 1."""

    def m_step(self, eta, t):
        return super().m_step(eta, Stats(t.terms, t.clients - 1))


class ForgottenCount(LearnedScale):
    """log_prob as if there were one client."""

    def log_prob(self, eta, t):
        return super().log_prob(eta, Stats(t.terms, 1.0))


class ForgottenSquare(LearnedScale):
    """The second moment in place of the variance."""

    def m_step(self, eta, t):
        var = tree.map(lambda s: s / t.clients, t["phi_sq"])
        return super().m_step(eta, t)._replace(var=var)


class MissingUplink(LearnedScale):
    """m_step reads what was not sent."""

    uplink = ("phi",)


class SwappedSign(LearnedScale):
    """A penalty where a log-density is due: stationary, but the worst place."""

    def log_prob(self, eta, t):
        return -super().log_prob(eta, t)


class ConstantTerm(LearnedScale):
    """A term that does not scale with the clients."""

    def log_prob(self, eta, t):
        return super().log_prob(eta, t) - 0.5 * tree.total(tree.map(torch.square, eta.mean))


class SlabMeanOverClients(priors.SpikeSlab):
    """w = sum z phi / S: closed gates pull weights to zero."""

    def m_step(self, eta, t):
        return super().m_step(eta, t)._replace(mean=tree.map(lambda s: s / t.clients, t["z_phi"]))


class ClosedGatesCount(priors.SpikeSlab):
    """The forgotten (S - sum pi) log(1 - theta)."""

    def log_prob(self, eta, t):
        return super().log_prob(eta, Stats(t.terms, 2.0))


class SixArguments(LearnedScale):
    def m_step(self, eta, t, extra):
        return super().m_step(eta, t)


@dataclass(frozen=True)
class Planted:
    """A mistake, and the laws that must catch it."""

    prior: type
    caught_by: tuple[str, ...]

    def case(self) -> Case:
        if issubclass(self.prior, priors.SpikeSlab):
            fields = bound(priors.SpikeSlab(0.1, 3.0), CONV, IMAGES)
            prior = self.prior(0.1, 3.0, groups=fields["prior"].groups)
            return Case(self.prior.__name__, prior, fields["params"], drawn_gates)
        return Case(self.prior.__name__, self.prior(1e-9), PRIORS[0].params, diagonal)


PLANTED = [
    Planted(MeanForSum, ("linear",)),
    Planted(WrongDivisor, ("stationary", "a_maximum")),
    Planted(ForgottenCount, ("stationary", "a_maximum", "linear")),
    Planted(ForgottenSquare, ("stationary", "a_maximum")),
    Planted(MissingUplink, ("stationary", "interface")),
    Planted(SwappedSign, ("a_maximum",)),
    Planted(ConstantTerm, ("stationary", "linear")),
    Planted(SlabMeanOverClients, ("stationary", "a_maximum")),
    Planted(ClosedGatesCount, ("stationary", "linear")),
    Planted(SixArguments, ("interface",)),
]


@pytest.mark.parametrize(
    ("planted", "law"),
    [pytest.param(p, law, id=f"{p.prior.__name__}-{law}") for p in PLANTED for law in p.caught_by],
)
def test_the_law_catches_the_mistake(planted: Planted, law: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        getattr(laws, law)(planted.case())


def test_the_laws_catch_mistakes_in_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that forgets the count, and a sum that keeps its first client only."""
    case = next(c for c in PRIORS if c.name == "gaussian-2")
    with monkeypatch.context() as patch:
        patch.setattr(Stats, "weighted", lambda t, w: Stats({k: tree.map(lambda v: w * v, t[k]) for k in t.terms}))
        with pytest.raises(AssertionError):
            laws.a_weight_is_copies(case)
    with monkeypatch.context() as patch:
        patch.setattr(Stats, "__add__", lambda t, other: Stats(t.terms, t.clients + other.clients))
        with pytest.raises(AssertionError):
            laws.order_is_irrelevant(case)


@pytest.mark.parametrize("prior", [LearnedScale(1e-9), priors.Gaussian(3.0)], ids=lambda p: type(p).__name__)
def test_the_unplanted_prior_passes_the_same_laws(prior) -> None:
    for posterior in (point, diagonal):
        for law in laws.LAWS:
            law(Case("unplanted", prior, PRIORS[0].params, posterior))


def test_statistics_only_add() -> None:
    """Sums need equal terms, and a sum's order of terms and clients is what was said."""
    a, b = Stats({"t": {"x": torch.tensor([1.0, 2.0])}}), Stats({"u": {"x": torch.zeros(2)}})
    with pytest.raises(ValueError, match=r"\['u'\].*\['t'\]"):
        _ = a + b
    both = a + a.weighted(2)
    assert both.clients == 3 and close(dict(both["t"]), {"x": torch.tensor([3.0, 6.0])})
    assert both.only(["t"]).clients == 3
    with pytest.raises(KeyError):
        both.only(["missing"])
