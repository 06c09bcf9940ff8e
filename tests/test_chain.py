"""FedPop's chain: its moments, both phases by hand, runs that keep it, and where they end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fedprior as fp
import quadratics
from cases import equal
from fedprior import Params, inference, priors, server
from fedprior.codecs import Dense
from fedprior.inference import chain
from fedprior.rng import generator
from laws import caught
from test_confidence import BASE, CLIENTS, HEAD, MODEL, OBJECTIVE
from test_random_effects import EYE, LAW, LAW_ETA, LINE, PEOPLE, best, posterior

PERSON = quadratics.clients()[0]
SPLIT = fp.fedpop(0.1, 0.4).bind(MODEL, CLIENTS[0].train.x).prior
ETA = SPLIT.init(OBJECTIVE.params())


def test_the_chain_has_the_moments_of_the_personal_posterior() -> None:
    """Covariance (P (I - lr P / (2 N)))^-1, from x' = (I - lr P / N) x + noise; the prior weighs as much as 2 examples.

    200 steps forget a start that is 60 deviations away, as the slowest direction shrinks by more than 3 % a step.
    """
    lr, n = 0.4, len(PERSON.train)
    eta = LAW_ETA._replace(square={"square": LAW_ETA.square["square"] + 0.25})
    var = float(LAW.variance(eta))
    assert var == pytest.approx(0.5, rel=1e-12)
    m, precision = posterior(PERSON, LAW_ETA.mean["weight"][0], torch.tensor(var).double())
    assert float(torch.linalg.eigvalsh(precision).min()) * lr / n > 0.03
    wanted = torch.linalg.inv(precision @ (EYE - lr * precision / (2 * n)))
    scale = wanted.diagonal().sqrt()
    far = {"weight": (m + 60 * scale)[None]}
    how = inference.Chain(lr, 3200, None, 200)
    q, state = how.e_step(LINE, LAW, eta, PERSON, far, generator(0, "chain"))
    drawn = torch.stack([sample["weight"][0] for sample in q.samples])
    assert len(drawn) == 3000 and torch.equal(state["weight"][0], drawn[-1])
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


def test_a_run_ends_there_too() -> None:
    """Chains that are kept between rounds, damped: within their noise.

    Over four seeds sigma^2 was off by 4 % and mu by 0.13 sigma at most. Without the posteriors' widths EM ends at 0.7
    of this sigma^2.
    """
    algorithm = fp.Algorithm(LAW, inference.Chain(0.1, 30, None, 5), server.Damped(0.1), name="all heads")
    result = quadratics.run(algorithm, PEOPLE, 60)
    mu, var = best(PEOPLE)
    assert (quadratics.phi(result) - mu).abs().max() < 0.2 * var.sqrt()
    assert float(LAW.variance(result.eta)) == pytest.approx(float(var), rel=0.15)


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
        lambda: test_both_phases_by_hand(True),
    ),
    "no noise": (
        chain,
        "walk",
        lambda f: lambda *args: f(*args, temperature=0.0),
        lambda: test_both_phases_by_hand(True),
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
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_closed_forms_catch_the_mistake(mistake: str) -> None:
    caught(*MISTAKES[mistake])
