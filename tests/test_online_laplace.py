"""FOLA: the precision against the exact Hessian and a plain loop, and the product of Gaussians in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fedprior as fp
import quadratics
from cases import close
from fedprior import Client, Examples, inference, posteriors, priors, tree
from fedprior.objective import Objective
from fedprior.rng import generator
from quadratics import SIZE, hessian, optimum, phi

STILL = 1e-12  # a learning rate that leaves phi where it is


def squares(client: Client, weight: Tensor, batch_size: int | None) -> Tensor:
    """What one epoch at a fixed phi adds up: A_s (t + 1) - t A of a first round."""
    net = quadratics.model()
    with torch.no_grad():
        net.weight.copy_(weight[None])
    objective, prior = Objective(net, "regression"), priors.OnlineLaplace()
    eta, e_step = prior.init(objective.params()), inference.Laplace(STILL, 1, batch_size)
    q, _ = e_step.e_step(objective, prior, eta, client, None, generator(0, "squares"))
    return 2 * q.precision["weight"][0] - prior.floor


def signs(count: int, rng: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, (count, 1), generator=rng).double() - 1


def test_one_example_a_step_is_the_hessian_where_residuals_are_one() -> None:
    """y = <x, phi> + 1 or - 1: then the empirical Fisher of the mean loss is its Hessian's diagonal, exactly."""
    rng, truth = generator(0, "fisher"), torch.tensor([1.0, -2.0, 0.5]).double()
    x = torch.randn(50, SIZE, generator=rng, dtype=torch.float64)
    client = Client(0, "unit", Examples(x, x @ truth[:, None] + signs(50, rng)))
    assert torch.allclose(squares(client, truth, 1), hessian(client).diag(), rtol=1e-9, atol=0)
    assert not torch.allclose(squares(client, truth, 5), hessian(client).diag(), rtol=0.1, atol=0)


def test_one_example_a_step_is_the_hessian_in_expectation() -> None:
    """Unit noise at the true phi: E r^2 = 1, Var r^2 = 2; 4,000 examples are within 5 standard errors."""
    rng, truth, count = generator(0, "noise"), torch.tensor([1.0, -2.0, 0.5]).double(), 4_000
    x = torch.randn(count, SIZE, generator=rng, dtype=torch.float64)
    client = Client(0, "noisy", Examples(x, x @ truth[:, None] + torch.randn(count, 1, generator=rng).double()))
    error = (squares(client, truth, 1) - hessian(client).diag()).abs()
    assert (error < 5 * (2 * x.pow(4).mean(0) / count).sqrt()).all()
    assert (error > 0).all()


def loop(client: Client, w: Tensor, a: Tensor, t: int, pull: float, lr: float, batch: int, rng: Any) -> Any:
    """One epoch of the authors' client, gradients by hand."""
    torch.randint(2**62, (), generator=rng)
    x, y, mu, total = client.train.x, client.train.y, w, t * a
    for rows in torch.randperm(len(x), generator=rng).split(batch):
        slope = x[rows].T @ (x[rows] @ w[:, None] - y[rows])[:, 0] / len(rows)
        total = total + len(rows) / len(x) * slope**2
        w = w - lr * (slope + pull * a * (w - mu))
    return w, total / (t + 1)


def test_the_run_is_the_authors_loop() -> None:
    """Three rounds of mini-batches: Omega over t, the pull c Omega / t, and means weighted by N_s Omega_s."""
    population, pull, lr, batch, floor = quadratics.clients(), 3.0, 0.05, 5, priors.OnlineLaplace().floor
    result = quadratics.run(fp.fola(lr, pull, 1, batch), population, 3)
    w, a = torch.full((SIZE,), 0.5).double(), torch.full((SIZE,), floor).double()
    for t in (1, 2, 3):
        ends = [
            (len(c.train), *loop(c, w, a, t, pull, lr, batch, generator(0, t, c.index, "e_step"))) for c in population
        ]
        w = sum(n * p * m for n, m, p in ends) / sum(n * p for n, _, p in ends)
        a = sum(n * p for n, _, p in ends) / sum(n for n, _, _ in ends)
    assert torch.allclose(phi(result), w, rtol=1e-9, atol=1e-9)
    assert torch.allclose(result.eta.precision["weight"][0], a, rtol=1e-9, atol=0)
    assert float(result.eta.rounds["t"]) == 4


def test_the_product_of_gaussians() -> None:
    """Modes and exact diagonal Hessians: one M-step is the optimum of all clients' data."""
    population, prior = quadratics.clients(diagonal=True), priors.OnlineLaplace()
    messages = [
        prior.stats(posteriors.Gaussian({"w": optimum(c)}, {"w": hessian(c).diag()})).weighted(len(c.train))
        for c in population
    ]
    eta = prior.m_step(prior.init({"w": torch.zeros(SIZE).double()}), sum(messages[1:], messages[0]))
    assert torch.allclose(eta.mean["w"], quadratics.best(population, "examples"), rtol=1e-9, atol=1e-9)


def test_where_nobody_is_sure_the_weight_stays() -> None:
    prior = priors.OnlineLaplace()
    eta = prior.init({"w": torch.tensor([3.0, 4.0])})
    q = posteriors.Gaussian({"w": torch.tensor([7.0, 8.0])}, {"w": torch.tensor([0.0, 2.0])})
    assert close(prior.m_step(eta, prior.stats(q)).mean, {"w": torch.tensor([3.0, 8.0])})


def test_what_does_not_fit_is_refused() -> None:
    made = fp.Algorithm(priors.Gaussian(), inference.Laplace(0.1))
    with pytest.raises(TypeError, match="Gaussian has none"):
        fp.run(made, quadratics.model(), quadratics.clients(), rounds=1, loss="regression")
    with pytest.raises(ValueError, match="floor > 0"):
        priors.OnlineLaplace(floor=0.0)


Method = Callable[..., Any]
WRONG: dict[str, tuple[str, Callable[[Method], Method]]] = {
    "plain mean": ("m_step", lambda f: lambda s, e, t: f(s, e, t)._replace(mean={"weight": t["a_phi"]["weight"]})),
    "Omega forgets its past": ("added", lambda f: lambda s, e, sq: tree.map(lambda x: x / 2, sq)),
    "pull of the wrong sign": ("log_prob", lambda f: lambda s, e, t: -f(s, e, t)),
    "Omega is not divided by t": ("added", lambda f: lambda s, e, sq: tree.map(torch.add, e.precision, sq)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_loop_catches_the_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, wrong = WRONG[mistake]
    monkeypatch.setattr(priors.OnlineLaplace, method, wrong(getattr(priors.OnlineLaplace, method)))
    with pytest.raises(AssertionError):
        test_the_run_is_the_authors_loop()
