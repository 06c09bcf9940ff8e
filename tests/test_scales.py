"""Priors whose scale is learned or mixed over: LearnedScale, Laplace, horseshoe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fedprior as fp
import laws
import learned_scale
import quadratics
from cases import PLAIN, Case, close, equal, scaled, total
from fedprior import inference, posteriors, priors, tree, wire
from fedprior.codecs import Dense
from fedprior.objective import Objective
from fedprior.rng import generator

KINDS = pytest.mark.parametrize("kind", ["laplace", "horseshoe"])


def test_the_librarys_learned_scale_is_that_of_the_guide() -> None:
    """The same statistics, log-densities and M-steps as the third party's class."""
    ours, theirs = priors.LearnedScale(1e-3), learned_scale.LearnedScale(1e-3)
    case = Case("guide", theirs, PLAIN, lambda c, rng: posteriors.Point({k: v + 1.5 for k, v in PLAIN.items()}))
    stats = total([replace(case, prior=p).client(0) for p in (ours, theirs)])
    a, b = ours.m_step(ours.init(PLAIN), stats), theirs.m_step(theirs.init(PLAIN), stats)
    assert equal(tree.flatten(a), tree.flatten(b))
    assert torch.equal(ours.log_prob(a, stats), theirs.log_prob(b, stats))


def test_one_statistic_more_is_twice_the_bytes() -> None:
    clients = quadratics.clients()
    ups = [quadratics.run(f(0.1), clients, 2).history[0].clients[0].bytes_up for f in (fp.learnedscale, fp.laplace)]
    plain = quadratics.run(fp.fedavg(0.1), clients, 2).history[0].clients[0].bytes_up
    assert [up - plain for up in ups] == [8 * quadratics.SIZE] * 2


def points(count: int = 7) -> Tensor:
    """Clients' weights with an outlier in each coordinate."""
    phi = torch.randn(count, quadratics.SIZE, generator=generator(0, "points"), dtype=torch.float64)
    phi[0] += 50
    return phi


def settle(prior: priors.ScaleMixture, phi: Tensor, steps: int = 400, start: Tensor | None = None) -> Tensor:
    """M-steps with posteriors that stay where they are, from their mean or from `start`."""
    eta = prior.init({"w": phi.mean(0) if start is None else start})
    for _ in range(steps):
        qs = [posteriors.Scaled({"w": row}, prior.confidence(eta, {"w": row})) for row in phi]
        eta = prior.m_step(eta, total([prior.stats(q) for q in qs]).only(prior.uplink))
    return eta.mean["w"]


@KINDS
@pytest.mark.parametrize("scale, smooth", [(0.5, 1e-2), (0.05, 1e-2), (3.0, 1e-3), (0.1, 1.0)])
def test_a_message_is_within_the_bounds_that_a_secure_sum_goes_by(kind: Any, scale: float, smooth: float) -> None:
    """Wherever a client's weights are; and within a third of them somewhere, so that the bits are of use."""
    prior, far = priors.ScaleMixture(kind, scale, smooth), torch.logspace(-6, 6, 400)
    made = replace(fp.laplace(), prior=prior)
    eta = prior.init({"w": torch.full((1201,), 0.3)})
    phi = {"w": 0.3 + torch.cat([far, -far, torch.zeros(1), torch.linspace(-4, 4, 400) * smooth])}
    message, _ = wire.difference(made, eta, made.message(eta, posteriors.Scaled(phi, prior.confidence(eta, phi))))
    for term, most in prior.bounds.items():
        least = most / 3 if smooth < scale else 0.0
        assert least < float(message[f"{term}/w"].abs().max()) <= most, term


def test_laplace_settles_at_the_median() -> None:
    """sum_s sqrt(d^2 + smooth^2) has its minimum within smooth of the median of an odd number of clients."""
    smooth = 1e-4
    w = settle(priors.ScaleMixture("laplace", 0.5, smooth), points(), 3000)
    assert (w - points().median(0).values).abs().max() < smooth
    assert (w - points().mean(0)).abs().min() > 1


def test_a_horseshoe_gives_up_on_an_outlier() -> None:
    """An outlier at 50 moves the mean of seven clients by 7, the centre by less than half; both from one start."""
    prior, phi = priors.ScaleMixture("horseshoe", 1.0, 0.1), points()
    start = phi[1:].median(0).values
    moved = settle(prior, phi, start=start) - settle(prior, phi[1:], start=start)
    assert moved.abs().max() < 0.5 < 5 < (phi.mean(0) - phi[1:].mean(0)).abs().min()


def explicit(kind: str, b: float, smooth: float) -> Callable[[Any, fp.Params], Tensor]:
    """log p(phi | w) of Laplace; the mean-field bound of the horseshoe, maximised by a plain loop over k."""

    def laplace(eta: Any, phi: fp.Params) -> Tensor:
        return -tree.total(tree.map(lambda w, p: ((p - w) ** 2 + smooth**2).sqrt(), eta.mean, phi)) / b

    def horseshoe(eta: Any, phi: fp.Params) -> Tensor:
        def bound(w: Tensor, p: Tensor) -> Tensor:
            u = ((p - w) ** 2 + smooth**2) / (2 * b**2)
            k = torch.ones_like(u)
            with torch.no_grad():
                for _ in range(400):
                    k = 1 / (1 / (1 + k) + u)
            return -k * u  # its slope at the optimal q(lambda, nu), by the envelope theorem

        return tree.total(tree.map(bound, eta.mean, phi))

    return {"laplace": laplace, "horseshoe": horseshoe}[kind]


@KINDS
def test_the_e_step_climbs_the_mixture_itself(kind: Any) -> None:
    """SGD on the reweighted pull is SGD on log p(phi | w) written out, as priors.Custom takes it."""
    client, objective = quadratics.clients()[0], Objective(quadratics.model(), "regression")
    mixture = priors.ScaleMixture(kind, 0.3, 0.1)
    custom = priors.Custom(explicit(kind, 0.3, 0.1))
    got, wanted = (
        e_step.e_step(objective, prior, prior.init(objective.params()), client, None, generator(0, "e_step"))[0]
        for e_step, prior in ((inference.Reweighted(0.05, 2, 5), mixture), (inference.Point(0.05, 2, 5), custom))
    )
    free, _ = inference.Point(0.05, 2, 5).e_step(
        objective, priors.Gaussian(), priors.Gaussian().init(objective.params()), client, None, generator(0, "e_step")
    )
    assert close(got.phi, wanted.phi, 1e-9)
    assert (got.phi["weight"] - free.phi["weight"]).abs().max() > 1e-3


def test_a_horseshoes_k_is_the_fixed_point() -> None:
    """u k^2 + u k - 1 = 0 against the two conditional expectations taken in turn."""
    prior, phi = priors.ScaleMixture("horseshoe", 0.7, 0.2), points()[0]
    k = prior.confidence(prior.init({"w": torch.zeros(3).double()}), {"w": phi})["w"] * 0.7**2
    u, wanted = (phi**2 + 0.2**2) / (2 * 0.7**2), torch.ones(3).double()
    for _ in range(2000):
        wanted = 1 / (1 / (1 + wanted) + u)
    assert torch.allclose(k, wanted, rtol=1e-9, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    made = fp.Algorithm(priors.Gaussian(), inference.Reweighted(0.1), codec=Dense("float64"))
    with pytest.raises(TypeError, match="Gaussian is none"):
        fp.run(made, quadratics.model(), quadratics.clients(), rounds=1, loss="regression")
    for wrong in ({"kind": "cauchy"}, {"smooth": 0.0}, {"scale": -1.0}):
        with pytest.raises(ValueError, match=r"need|must be"):
            priors.ScaleMixture(**wrong)
    with pytest.raises(ValueError, match="floor <= first"):
        priors.LearnedScale(2.0, 1.0)


Method = Callable[..., Any]
MIXED: dict[str, tuple[str, Callable[[Method], Method], Callable[[], None]]] = {
    "mean instead of a weighted mean": (
        "m_step",
        lambda f: lambda s, e, t: s.Eta(tree.map(lambda x: x / t.clients, t["conf_phi"])),
        lambda: laws.stationary(Case("mixture", priors.ScaleMixture(), PLAIN, scaled)),
    ),
    "confidence is its inverse": (
        "confidence",
        lambda f: lambda s, e, p: tree.map(torch.reciprocal, f(s, e, p)),
        test_laplace_settles_at_the_median,
    ),
    "the scale is forgotten": (
        "confidence",
        lambda f: lambda s, e, p: tree.map(lambda c: c * s.scale, f(s, e, p)),
        lambda: test_the_e_step_climbs_the_mixture_itself("laplace"),
    ),
    "pull away from w": (
        "log_prob",
        lambda f: lambda s, e, t: -f(s, e, t),
        lambda: test_the_e_step_climbs_the_mixture_itself("horseshoe"),
    ),
    "u without the factor 2": (
        "confidence",
        lambda f: lambda s, e, p: f(replace(s, scale=s.scale * 2**0.5), e, p),
        test_a_horseshoes_k_is_the_fixed_point,
    ),
}


@pytest.mark.parametrize("mistake", MIXED)
def test_the_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, wrong, check = MIXED[mistake]
    monkeypatch.setattr(priors.ScaleMixture, method, wrong(getattr(priors.ScaleMixture, method)))
    with pytest.raises(AssertionError):
        check()
