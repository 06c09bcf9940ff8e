"""FedPop: a chain's moments, both phases by hand, EM to the maximum of the marginal likelihood, averaged statistics."""

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
from cases import close, equal
from fedprior import Client, Params, Stats, inference, posteriors, priors, server, tree
from fedprior.codecs import Dense
from fedprior.inference import chain
from fedprior.objective import Objective
from fedprior.rng import generator
from quadratics import SIZE, hessian, optimum
from test_confidence import BASE, CLIENTS, HEAD, MODEL, OBJECTIVE

LINE = Objective(quadratics.model(), "regression")
PEOPLE = quadratics.clients((12, 16, 24, 9, 14))
PERSON = PEOPLE[0]
LAW = priors.RandomEffects(0.5, 1e-6)
LAW_ETA = LAW.init(LINE.params())
EYE = torch.eye(SIZE, dtype=torch.float64)
SPLIT = fp.fedpop(0.1, 0.4).bind(MODEL, CLIENTS[0].train.x).prior
ETA = SPLIT.init(OBJECTIVE.params())


def posterior(client: Client, mu: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and precision of a linear-Gaussian client's phi: N H + 1 / sigma^2, and what it balances."""
    h = len(client.train) * hessian(client)
    precision = h + EYE / var
    return torch.linalg.solve(precision, h @ optimum(client) + mu / var), precision


def test_the_chain_has_the_moments_of_the_personal_posterior() -> None:
    """Covariance (P (I - lr P / (2 N)))^-1, from x' = (I - lr P / N) x + noise; the prior weighs as much as 2 examples.

    300 steps forget a start that is 20 deviations away, as the slowest direction shrinks by more than 1 % a step.
    """
    lr, n = 0.2, len(PERSON.train)
    eta = LAW_ETA._replace(square={"square": LAW_ETA.square["square"] + 0.25})
    var = float(LAW.variance(eta))
    assert var == pytest.approx(0.5, rel=1e-12)
    m, precision = posterior(PERSON, LAW_ETA.mean["weight"][0], torch.tensor(var).double())
    wanted = torch.linalg.inv(precision @ (EYE - lr * precision / (2 * n)))
    scale = wanted.diagonal().sqrt()
    far = {"weight": (m + 20 * scale)[None]}
    how = inference.Chain(lr, 6300, None, 300)
    q, state = how.e_step(LINE, LAW, eta, PERSON, far, generator(0, "chain"))
    drawn = torch.stack([sample["weight"][0] for sample in q.samples])
    assert len(drawn) == 6000 and torch.equal(state["weight"][0], drawn[-1])
    assert ((drawn.mean(0) - m).abs() < 0.15 * scale).all()
    assert ((torch.cov(drawn.T) - wanted).abs() < 0.15 * scale.outer(scale)).all()
    assert torch.allclose(q.mean()["weight"][0], drawn.mean(0), rtol=1e-12)
    assert torch.allclose(q.second_moment()["weight"][0], drawn.square().mean(0), rtol=1e-12)


def by_hand(state: Tensor, psi: Tensor, mu: Tensor, var: float, how: inference.Chain) -> tuple[list[Tensor], Tensor]:
    """The samples and the shared parameters: gradients in closed form, the noise and the order of a run's generator."""
    rng, client = generator(0, "e_step"), CLIENTS[0]
    x, y, n, theta = client.train.x, client.train.y[:, 0], len(client.train), state
    samples: list[Tensor] = []
    for epoch in range(how.epochs):
        torch.randint(2**62, (), generator=rng)
        torch.randperm(n, generator=rng)
        slope = x[:, BASE:].T @ (y - x[:, :BASE] @ psi - x[:, BASE:] @ theta) + (mu - theta) / var
        xi = torch.randn(1, HEAD, generator=rng, dtype=torch.float64)[0]
        theta = theta + how.lr * slope / n + math.sqrt(2 * how.lr / n) * xi
        samples += [theta] if epoch >= how.burn_in else []
    for theta in samples:
        psi = psi + how.lr * x[:, :BASE].T @ (y - x[:, :BASE] @ psi - x[:, BASE:] @ theta) / n
    return samples, psi


@pytest.mark.parametrize("seen", [True, False])
def test_both_phases_by_hand(seen: bool) -> None:
    """Five steps of the head of which three are samples, then one of the base at each; a new client begins at mu."""
    how = inference.Chain(0.1, 5, None, 2)
    mu = ETA.part0_mean["head.weight"][0]
    first = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64) if seen else mu
    state = {"head.weight": first[None]} if seen else None
    q, after = how.e_step(OBJECTIVE, SPLIT, ETA, CLIENTS[0], state, generator(0, "e_step"))
    samples, psi = by_hand(first, ETA.part1_mean["base.weight"][0], mu, 0.4**2, how)
    assert len(q.samples) == len(samples) == 3
    for got, want in zip(q.samples, samples, strict=True):
        assert got.keys() == {"head.weight"} and torch.allclose(got["head.weight"][0], want, rtol=1e-9, atol=1e-9)
    assert torch.allclose(q.phi["base.weight"][0], psi, rtol=1e-9, atol=1e-9)
    assert after.keys() == {"head.weight"} and equal(after, q.samples[-1])


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


def test_a_run_ends_there_too() -> None:
    """Chains that are kept between rounds, damped: within a few deviations of the noise, 0.1 sigma."""
    algorithm = fp.Algorithm(LAW, inference.Chain(0.1, 30, None, 5), server.Damped(0.1), name="all heads")
    result = quadratics.run(algorithm, PEOPLE, 60)
    mu, var = best(PEOPLE)
    assert (quadratics.phi(result) - mu).abs().max() < 0.1 * var.sqrt()
    assert float(LAW.variance(result.eta)) == pytest.approx(float(var), rel=0.1)


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
    q = posteriors.Samples(LINE.params(), tuple({"weight": torch.randn(1, SIZE).double()} for _ in range(4)))
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


def test_a_run_keeps_the_chain_and_predicts_with_its_samples() -> None:
    """Round 2's samples are those of an E-step from round 1's state; a personal prediction mixes one more."""
    algorithm = replace(fp.fedpop(0.1, batch_size=None), codec=Dense("float64"))

    def after(rounds: int) -> fp.Result:
        return fp.run(algorithm, MODEL, CLIENTS, rounds=rounds, loss="regression", seed=3)

    def own(result: fp.Result) -> Params:
        state = result.store.load(0) or {}
        assert state.keys() == {"e_step/head.weight"}
        return {k.removeprefix("e_step/"): v for k, v in state.items()}

    first, second = after(1), after(2)
    how, prior = first.algorithm.inference, first.algorithm.prior
    q, state = how.e_step(OBJECTIVE, prior, first.eta, CLIENTS[0], own(first), generator(3, 2, 0, "e_step"))
    assert equal(state or {}, own(second))
    q, _ = how.e_step(OBJECTIVE, prior, second.eta, CLIENTS[0], own(second), generator(0, 0, "personal"))
    mixed = second.personal(CLIENTS[0])
    assert mixed.weights == (0.2,) * 5
    for model, sample in zip(mixed.models, q.samples, strict=True):
        assert equal(model, q.phi | sample)
    assert len({float(m["head.weight"].sum()) for m in mixed.models}) == 5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Chain needs a prior with parameters to sample, and Gaussian has none"):
        fp.run(fp.Algorithm(priors.Gaussian(), inference.Chain(0.1)), MODEL, CLIENTS, rounds=1, loss="regression")
    with pytest.raises(TypeError, match="Chain needs a prior with parameters to sample, and Split has none"):
        fp.run(replace(fp.fedper(0.1), inference=inference.Chain(0.1)), MODEL, CLIENTS, rounds=1, loss="regression")
    with pytest.raises(ValueError, match="no parameter is left for 'fc"):
        fp.run(fp.fedpop(0.1, head="fc.*"), MODEL, CLIENTS, rounds=1, loss="regression")
    for sigma, floor in ((0.0, 1e-3), (0.01, 1e-3), (0.1, 0.0)):
        with pytest.raises(ValueError, match=r"need 0 < floor <= sigma\^2"):
            priors.RandomEffects(sigma, floor)
    with pytest.raises(ValueError, match="need 0 <= burn_in < epochs, got burn_in=5 and epochs=5"):
        fp.fedpop(0.1, epochs=5)


def replaced_terms(change: Callable[[Any], dict[str, Params]]) -> Callable[[Any], Any]:
    return lambda f: lambda *args: (lambda t: replace(t, terms={**t.terms, **change(t)}))(f(*args))


def walk_with(**changed: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The chain with one of its arguments changed."""
    names = ("how", "objective", "phi", "term", "client", "rng", "names")

    def planted(f: Any) -> Any:
        return lambda *args: f(**{k: changed[k](v) if k in changed else v for k, v in zip(names, args, strict=True)})

    return planted


MISTAKES: dict[str, tuple[Any, str, Callable[[Any], Any], Callable[[], None]]] = {
    "the prior in nats per data set": (
        chain,
        "walk",
        walk_with(term=lambda term: lambda phi: len(PERSON.train) * term(phi)),
        test_the_chain_has_the_moments_of_the_personal_posterior,
    ),
    "a repelling prior": (
        chain,
        "walk",
        walk_with(term=lambda term: lambda phi: -term(phi)),
        test_the_chain_has_the_moments_of_the_personal_posterior,
    ),
    "no noise": (
        chain,
        "walk",
        lambda f: lambda *args: f(*args, temperature=0.0),
        test_the_chain_has_the_moments_of_the_personal_posterior,
    ),
    "no burn-in": (
        inference.Chain,
        "e_step",
        lambda f: lambda s, *args: f(replace(s, epochs=s.epochs - s.burn_in, burn_in=0), *args),
        test_the_chain_has_the_moments_of_the_personal_posterior,
    ),
    "no burn-in, by hand": (
        inference.Chain,
        "e_step",
        lambda f: lambda s, *args: f(replace(s, burn_in=0), *args),
        lambda: test_both_phases_by_hand(True),
    ),
    "a chain that is not kept": (
        inference.Chain,
        "e_step",
        lambda f: lambda s, objective, prior, eta, client, state, rng: f(s, objective, prior, eta, client, None, rng),
        lambda: test_both_phases_by_hand(True),
    ),
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
        test_a_run_ends_there_too,
    ),
    "no log sigma": (
        priors.RandomEffects,
        "log_prob",
        lambda f: lambda s, eta, t: f(s, eta, t) + 0.5 * SIZE * t.clients * s.variance(eta).log(),
        test_log_prob_is_the_density,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_closed_forms_catch_the_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, wrong, test = MISTAKES[mistake]
    monkeypatch.setattr(owner, method, wrong(getattr(owner, method)))
    with pytest.raises(AssertionError):
        test()
