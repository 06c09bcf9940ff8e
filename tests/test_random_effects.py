"""FedPop's population: EM ends at the maximum of the marginal likelihood, a damped step averages statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian as hessian_of
from torch.autograd.functional import jacobian

import fedprior as fp
import quadratics
from cases import close
from fedprior import Client, Params, Stats, inference, posteriors, priors, server, tree
from fedprior.objective import Objective
from fedprior.rng import generator
from laws import caught
from quadratics import SIZE, hessian, optimum

LINE = Objective(quadratics.model(), "regression")
PEOPLE = quadratics.clients((4, 5, 3, 6, 4, 5, 3, 4))  # so few examples that posteriors are as wide as the population
LAW = priors.RandomEffects(0.5, 1e-6)
LAW_ETA = LAW.init(LINE.params())
EYE = torch.eye(SIZE, dtype=torch.float64)


def posterior(client: Client, mu: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and precision of a linear-Gaussian client's phi: N H + 1 / sigma^2, and what it balances."""
    h = len(client.train) * hessian(client)
    precision = h + EYE / var
    return torch.linalg.solve(precision, h @ optimum(client) + mu / var), precision


def marginal(clients: Sequence[Client], mu: Tensor, log_var: Tensor) -> Tensor:
    """sum_s log N(y_s; X_s mu, I + sigma^2 X_s X_s')."""
    total = torch.zeros((), dtype=torch.float64)
    for client in clients:
        x, y = client.train.x, client.train.y[:, 0]
        covariance = torch.eye(len(x), dtype=torch.float64) + log_var.exp() * x @ x.T
        total = total + torch.distributions.MultivariateNormal(x @ mu, covariance).log_prob(y)
    return total


def exact_em(prior: priors.RandomEffects, clients: Sequence[Client], rounds: int) -> list[Any]:
    """eta after each round, with the E-step in closed form."""
    etas = [prior.init(LINE.params())]
    for _ in range(rounds):
        t = []
        for client in clients:
            m, precision = posterior(client, etas[-1].mean["weight"][0], prior.variance(etas[-1]))
            widths = 1 / torch.linalg.inv(precision).diagonal()
            t.append(prior.stats(posteriors.Gaussian({"weight": m[None]}, {"weight": widths[None]})))
        etas.append(prior.m_step(etas[-1], sum(t[1:], t[0])))
    return etas


def best(clients: Sequence[Client]) -> tuple[Tensor, Tensor]:
    """mu and sigma^2 of the largest marginal likelihood, by Newton's method on it: no EM."""
    point = torch.cat([torch.stack([optimum(c) for c in clients]).mean(0), torch.ones(1, dtype=torch.float64)])

    def value(v: Tensor) -> Tensor:
        return marginal(clients, v[:SIZE], v[SIZE])

    for _ in range(12):
        point = point - torch.linalg.solve(hessian_of(value, point), jacobian(value, point))
    assert float(jacobian(value, point).abs().max()) < 1e-8
    assert float(torch.linalg.eigvalsh(hessian_of(value, point)).max()) < 0
    return point[:SIZE], point[SIZE].exp()


def test_em_ends_at_the_maximum_of_the_marginal_likelihood() -> None:
    """No round lowers it, and its fixed point is Newton's."""
    etas = exact_em(LAW, PEOPLE, 200)
    values = [float(marginal(PEOPLE, eta.mean["weight"][0], LAW.variance(eta).log())) for eta in etas]
    assert all(b > a - 1e-9 for a, b in pairwise(values)) and values[1] > values[0] + 1
    mu, var = best(PEOPLE)
    assert torch.allclose(etas[-1].mean["weight"][0], mu, rtol=1e-6, atol=1e-6)
    assert float(LAW.variance(etas[-1])) == pytest.approx(float(var), rel=1e-6)


def test_a_damped_step_averages_statistics() -> None:
    """SAEM: (1 - rate) S + rate T, and the M-step of that; a damped sigma^2 would miss what mu has moved."""
    rate, rng = 0.25, generator(0, "saem")

    def round_of(clients: int) -> Stats:
        t = [
            LAW.stats(posteriors.Point({"weight": torch.randn(1, SIZE, generator=rng).double()}))
            for _ in range(clients)
        ]
        return sum(t[1:], t[0])

    one, two = round_of(3), round_of(4)
    eta = LAW.m_step(LAW_ETA, one)
    algorithm = fp.Algorithm(LAW, inference.Chain(0.1), server.Damped(rate))
    got, _ = algorithm.m_step(eta, two, {})
    average = one.weighted((1 - rate) / one.clients) + two.weighted(rate / two.clients)
    want = LAW.m_step(eta, average)
    assert close(tree.flatten(got), tree.flatten(want), 1e-12)
    damped = (1 - rate) * LAW.variance(eta) + rate * LAW.variance(LAW.m_step(eta, two))
    assert float(LAW.variance(got) - damped) > 1e-3


def test_log_prob_is_the_density() -> None:
    """E log N(theta; mu, sigma^2), up to the constant, by a plain loop over samples and entries."""
    rng = generator(0, "density")
    drawn = tuple({"weight": torch.randn(1, SIZE, generator=rng, dtype=torch.float64)} for _ in range(4))
    q = posteriors.Samples(LINE.params(), drawn)
    value = 0.0
    for sample in q.samples:
        for a, mu in zip(sample["weight"][0].tolist(), LAW_ETA.mean["weight"][0].tolist(), strict=True):
            value += (-0.5 * ((a - mu) / 0.5) ** 2 - math.log(0.5)) / len(q.samples)
    assert float(LAW.log_prob(LAW_ETA, LAW.stats(q))) == pytest.approx(value, rel=1e-9)


def test_clients_that_agree_leave_the_floor() -> None:
    prior = priors.RandomEffects(0.5, 0.01)
    t = prior.stats(posteriors.Point(LINE.params())).weighted(3)
    eta = prior.m_step(LAW_ETA, t)
    assert float(prior.variance(eta)) == 0.01
    leaf = {"weight": eta.mean["weight"].clone().requires_grad_()}
    prior.log_prob(eta._replace(mean=leaf), t).backward()
    assert leaf["weight"].grad is not None and float(leaf["weight"].grad.abs().max()) < 1e-9


def replaced_terms(change: Callable[[Any], dict[str, Params]]) -> Callable[[Any], Any]:
    return lambda f: lambda *args: (lambda t: replace(t, terms={**t.terms, **change(t)}))(f(*args))


MISTAKES: dict[str, tuple[Any, str, Callable[[Any], Any], Callable[[], None]]] = {
    "a sum for a mean": (
        priors.RandomEffects,
        "stats",
        replaced_terms(lambda t: {"square": {"square": SIZE * t["square"]["square"]}}),
        test_em_ends_at_the_maximum_of_the_marginal_likelihood,
    ),
    "no posterior variance": (
        posteriors.Gaussian,
        "second_moment",
        lambda f: lambda q: tree.map(torch.square, q.phi),
        test_em_ends_at_the_maximum_of_the_marginal_likelihood,
    ),
    "the second moment for the variance": (
        priors.RandomEffects,
        "variance",
        lambda f: lambda s, eta: eta.square["square"],
        test_em_ends_at_the_maximum_of_the_marginal_likelihood,
    ),
    "the square of the mean sample": (
        posteriors.Samples,
        "second_moment",
        lambda f: lambda q: tree.map(torch.square, q.mean()),
        test_log_prob_is_the_density,
    ),
    "no log sigma": (
        priors.RandomEffects,
        "log_prob",
        lambda f: lambda s, eta, t: f(s, eta, t) + 0.5 * SIZE * t.clients * s.variance(eta).log(),
        test_log_prob_is_the_density,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_closed_forms_catch_the_mistake(mistake: str) -> None:
    caught(*MISTAKES[mistake])
