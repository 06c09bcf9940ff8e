"""Exact EM: with an exact E-step the marginal likelihood never falls, and ends where its closed form says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cases import MLP, VECTORS, bound, total
from draws import Diagonal
from fedprior import posteriors, priors
from fedprior.core import Stats
from fedprior.rng import generator
from learned_scale import LearnedScale


@dataclass(frozen=True)
class Linear:
    """y = A phi + unit noise, phi ~ N(w, diag(1/precision)): everything about it is in closed form."""

    design: Tensor
    y: Tensor

    def posterior(self, w: Tensor, precision: Tensor) -> Diagonal:
        covariance = torch.linalg.inv(self.design.T @ self.design + precision.diag())
        mean = covariance @ (self.design.T @ self.y + precision * w)
        return Diagonal({"w": mean}, {"w": covariance.diag()})

    def covariance(self, precision: Tensor) -> Tensor:
        return torch.eye(len(self.y), dtype=torch.float64) + self.design @ (1 / precision).diag() @ self.design.T

    def log_marginal(self, w: Tensor, precision: Tensor) -> Tensor:
        normal = torch.distributions.MultivariateNormal(self.design @ w, self.covariance(precision))
        return normal.log_prob(self.y)


def linear_clients(count: int = 6, size: int = 3) -> list[Linear]:
    """Ragged numbers of observations, some fewer than parameters."""
    rng = generator(0, "linear")
    clients = []
    for index in range(count):
        design = torch.randn(2 + index, size, generator=rng, dtype=torch.float64)
        phi = 2 * torch.randn(size, generator=rng, dtype=torch.float64) + 1
        clients.append(Linear(design, design @ phi + torch.randn(2 + index, generator=rng, dtype=torch.float64)))
    return clients


def em(prior, precision: Callable[..., Tensor], clients: list[Linear], steps: int, eta=None, watch: int = 50):
    """The last eta, and the exact objective before each of the first `watch` steps."""
    eta, objective = eta or prior.init({"w": torch.zeros(3, dtype=torch.float64)}), []
    for step in range(steps):
        w, lam = eta.mean["w"], precision(eta)
        if step < watch:
            objective.append(float(sum(c.log_marginal(w, lam) for c in clients)))
        stats = total([prior.stats(c.posterior(w, lam)) for c in clients])
        eta = prior.m_step(eta, stats.only(prior.uplink))
    return eta, torch.tensor(objective, dtype=torch.float64)


@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
def test_gaussian_prior_climbs_to_generalised_least_squares(lam: float) -> None:
    """The maximiser over w of sum_s log N(y_s; A_s w, C_s) solves (sum A'C^-1 A) w = sum A'C^-1 y."""
    precision, clients = torch.full((3,), lam, dtype=torch.float64), linear_clients()
    eta, objective = em(priors.Gaussian(lam), lambda eta: precision, clients, 50)
    assert (objective.diff() >= -1e-10).all()
    assert objective[1] > objective[0] + 1e-3
    eta, _ = em(priors.Gaussian(lam), lambda eta: precision, clients, 500)
    weights = [torch.linalg.solve(c.covariance(precision), c.design) for c in clients]
    left = sum(v.T @ c.design for v, c in zip(weights, clients, strict=True))
    right = sum(v.T @ c.y for v, c in zip(weights, clients, strict=True))
    assert torch.allclose(eta.mean["w"], torch.linalg.solve(left, right), rtol=0, atol=1e-8)


def test_a_wrong_e_step_is_noticed() -> None:
    """The law can fail: second moments without the posterior's variance make the objective fall."""
    clients, prior = linear_clients(), LearnedScale(1e-9)
    eta, _ = em(prior, lambda eta: 1 / eta.var["w"], clients, 50)

    class Narrow(LearnedScale):
        def stats(self, q):
            return super().stats(posteriors.Point(q.mean()))

    _, wrong = em(Narrow(1e-9), lambda eta: 1 / eta.var["w"], clients, 5, eta)
    assert (wrong.diff() < -1e-3).any()


def test_learned_variance_climbs() -> None:
    """Ragged designs: monotone, and the exact gradient vanishes at the end."""
    clients = linear_clients(8)
    eta, objective = em(LearnedScale(1e-9), lambda eta: 1 / eta.var["w"], clients, 800)
    assert (objective.diff() >= -1e-10).all()
    assert objective[49] > objective[0] + 1
    w, v = (x["w"].clone().requires_grad_() for x in eta)
    sum(c.log_marginal(w, 1 / v) for c in clients).backward()
    assert w.grad.abs().max() < 1e-6 and v.grad.abs().max() < 1e-6


def test_learned_variance_in_closed_form() -> None:
    """With A = I the marginal is N(w, v + 1): w is the mean of y, and v + 1 its variance."""
    y = 3 * torch.randn(9, 3, generator=generator(0, "y"), dtype=torch.float64)
    clients = [Linear(torch.eye(3, dtype=torch.float64), row) for row in y]
    variance = y.var(0, correction=0) - 1
    assert (variance > 1).all()
    eta, objective = em(LearnedScale(1e-9), lambda eta: 1 / eta.var["w"], clients, 200)
    assert (objective.diff() >= -1e-10).all()
    assert torch.allclose(eta.mean["w"], y.mean(0), atol=1e-8)
    assert torch.allclose(eta.var["w"], variance, atol=1e-8)


SLAB = bound(priors.SpikeSlab(0.0), MLP, VECTORS)
UNITS = [(g.name, unit) for g in SLAB["prior"].groups for unit in range(g.units)]
GATES = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(UNITS))


def gate_posterior(log_lik: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Bayes over all gates of a client: P(z_g = 1 | D), and log p(D), from log p(D | z) of every z in GATES."""
    joint = log_lik + (torch.xlogy(GATES, theta) + torch.xlogy(1 - GATES, 1 - theta)).sum(1)
    return joint.softmax(0) @ GATES, joint.logsumexp(0)


def as_groups(values: Tensor) -> dict[str, Tensor]:
    split = values.split([g.units for g in SLAB["prior"].groups])
    return {g.name: v for g, v in zip(SLAB["prior"].groups, split, strict=True)}


def gate_stats(prior, pi: Tensor) -> Stats:
    keep = as_groups(pi)
    return prior.stats(posteriors.Gated(SLAB["params"], keep, keep))


def test_gates_climb() -> None:
    """z ~ Bernoulli(theta), any p(D_s | z): theta from SpikeSlab's M-step never lowers sum_s log p(D_s)."""
    rng, prior = generator(0, "gates"), SLAB["prior"]
    clients = [2 * torch.randn(len(GATES), generator=rng, dtype=torch.float64) for _ in range(5)]
    eta, objective = prior.init(SLAB["params"]), []
    for _ in range(500):
        theta = torch.cat(list(eta.keep.values()))
        results = [gate_posterior(log_lik, theta) for log_lik in clients]
        objective.append(float(sum(log_p for _, log_p in results)))
        stats = total([gate_stats(prior, pi) for pi, _ in results])
        eta = prior.m_step(eta, stats.only(prior.uplink))
    steps = torch.tensor(objective, dtype=torch.float64)
    assert (steps.diff() >= -1e-10).all()
    assert steps[-1] > steps[0] + 0.1
    theta = torch.cat(list(eta.keep.values())).clamp(1e-9, 1 - 1e-9).requires_grad_()
    sum(gate_posterior(log_lik, theta)[1] for log_lik in clients).backward()
    inside = (theta > 1e-3) & (theta < 1 - 1e-3)
    assert inside.any() and theta.grad[inside].abs().max() < 1e-5
    assert (theta.grad[theta >= 1 - 1e-3] >= 0).all() and (theta.grad[theta <= 1e-3] <= 0).all()


def test_one_gate_in_closed_form() -> None:
    """Clients that know their gate: theta is the fraction of open ones, after one step."""
    prior = SLAB["prior"]
    eta = prior.init(SLAB["params"])
    known = [torch.tensor([float(i < 3), float(i < 1), 1, 0, 0.5], dtype=torch.float64) for i in range(4)]
    eta = prior.m_step(eta, total([gate_stats(prior, z) for z in known]).only(prior.uplink))
    want = torch.tensor([3 / 4, 1 / 4, 1, 0, 0.5], dtype=torch.float64)
    assert torch.allclose(torch.cat(list(eta.keep.values())), want)
