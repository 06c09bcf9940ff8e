"""FedPA: its O(n^2 d) line against the dense inverse and the recursion, and where it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fedprior as fp
import quadratics
from cases import close
from fedprior import inference, posteriors, priors
from fedprior.inference import averaged
from fedprior.objective import Objective
from fedprior.rng import generator
from quadratics import SIZE, best, hessian, optimum, phi

CLIENTS = quadratics.clients()


def dense(w: Tensor, samples: Tensor, shrinkage: float) -> Tensor:
    """The shrinkage covariance itself, inverted."""
    n, d = samples.shape
    rho = 1 / (1 + (n - 1) * shrinkage)
    x = samples - samples.mean(0)
    sample = x.T @ x / max(n - 1, 1)
    return torch.linalg.solve(rho * torch.eye(d).double() + (1 - rho) * sample, w - samples.mean(0))


def recursion(w: Tensor, samples: Tensor, shrinkage: float) -> Tensor:
    """One sample after the other: A_n = A_{n-1} + shrinkage (n-1)/n d d', d = x_n - mean_{n-1}, by Sherman-Morrison."""
    mean, n, inverse = samples[0], 1, torch.eye(samples.shape[1]).double()
    for x in samples[1:]:
        n += 1
        d = x - mean
        v = inverse @ d
        gamma = shrinkage * (n - 1) / n
        inverse = inverse - gamma * torch.outer(v, v) / (1 + gamma * d @ v)
        mean = mean + d / n
    return (1 + (n - 1) * shrinkage) * inverse @ (w - mean)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 1.0, 100.0])
def test_the_line_is_the_dense_inverse(n: int, shrinkage: float) -> None:
    rng = generator(0, "samples")
    w, samples = torch.randn(5, generator=rng).double(), 3 * torch.randn(n, 5, generator=rng).double()
    got = averaged.delta(w, samples, shrinkage)
    assert torch.allclose(got, dense(w, samples, shrinkage), rtol=1e-9, atol=1e-9)
    assert torch.allclose(got, recursion(w, samples, shrinkage), rtol=1e-9, atol=1e-9)


def test_one_sample_is_fedavg() -> None:
    """Every step one mean, no burn-in, one epoch of one batch: w - (w - phi)."""
    made = fp.Algorithm(priors.Gaussian(), inference.Averaged(0.1, 1, None, 0), weighting="examples")
    runs = [quadratics.run(a, CLIENTS, 3).params for a in (made, fp.fedavg(0.1, 1, None))]
    assert close(*runs, 1e-12)


@dataclass(frozen=True)
class Exact:
    """An E-step with samples that have a client's posterior mean and covariance: mu ± columns of a root."""

    shrinkage: float

    def start(self, prior: Any, eta: Any) -> posteriors.Point:
        return posteriors.Point(prior.point(eta))

    def e_step(self, objective: Any, prior: Any, eta: Any, client: fp.Client, state: Any, rng: Any) -> Any:
        covariance = torch.linalg.inv(len(client.train) * hessian(client))
        root = torch.linalg.cholesky(covariance) * (SIZE - 0.5) ** 0.5  # 2d samples: sum over 2d - 1
        samples = optimum(client) + torch.cat([root.T, -root.T])
        assert torch.allclose(samples.T.cov(), covariance)
        w = eta.mean["weight"][0]
        return posteriors.Point({"weight": (w - averaged.delta(w, samples, self.shrinkage))[None]}), state


def test_with_exact_moments_it_ends_at_the_product_posteriors_mean() -> None:
    """sum Sigma_s^-1 (w - mu_s) = 0, Sigma_s the shrunk covariance; for rho_n -> 0 that is the joint optimum."""
    wanted, ends = best(CLIENTS, "examples"), {}
    for shrinkage in (1.0, 1e4):
        rho = 1 / (1 + (2 * SIZE - 1) * shrinkage)
        shrunk = [
            torch.linalg.inv(rho * torch.eye(SIZE).double() + (1 - rho) * torch.linalg.inv(len(c.train) * hessian(c)))
            for c in CLIENTS
        ]
        step = fp.server.Damped(1 / max(float(torch.linalg.eigvalsh(h)[-1]) for h in shrunk))
        ends[shrinkage] = phi(quadratics.run(fp.Algorithm(priors.Gaussian(), Exact(shrinkage), step), CLIENTS, 300))
        joint = quadratics.joint(shrunk, [optimum(c) for c in CLIENTS])
        assert torch.allclose(ends[shrinkage], joint, rtol=0, atol=1e-6)
    assert (ends[1e4] - wanted).abs().max() < 1e-3 < (ends[1.0] - wanted).abs().max()
    identity = quadratics.run(fp.Algorithm(priors.Gaussian(), Exact(0.0), fp.server.Exact()), CLIENTS, 2)
    mean = torch.stack([optimum(c) for c in CLIENTS]).mean(0)
    assert torch.allclose(phi(identity), mean, rtol=0, atol=1e-9)
    assert (mean - best(CLIENTS, "examples")).abs().max() > 0.1


def test_iterates_are_averaged_after_the_burn_in() -> None:
    """Three epochs, one to burn: samples of two steps each from a plain loop; what is left over is not used."""
    client, objective = CLIENTS[0], Objective(quadratics.model(), "regression")
    prior, lr = priors.Gaussian(), 0.1
    eta = prior.init(objective.params())
    e_step = inference.Averaged(lr, 3, 4, 1, 2, 0.5)
    q, _ = e_step.e_step(objective, prior, eta, client, None, generator(0, "e_step"))
    rng, x, iterates = generator(0, "e_step"), eta.mean["weight"][0], []
    torch.randint(2**62, (), generator=rng)
    for _ in range(3):
        for rows in torch.randperm(len(client.train), generator=rng).split(4):
            a, y = client.train.x[rows], client.train.y[rows, 0]
            x = x - lr * a.T @ (a @ x - y) / len(rows)
            iterates.append(x)
    steps = -(-len(client.train) // 4)
    used = iterates[steps:]
    samples = torch.stack([(used[i] + used[i + 1]) / 2 for i in range(0, len(used) - 1, 2)])
    w = eta.mean["weight"][0]
    assert torch.allclose(q.phi["weight"][0], w - dense(w, samples, 0.5), rtol=1e-9, atol=1e-9)


def test_too_few_steps_send_the_last_iterate() -> None:
    """every=100 is never reached: FedAvg's own weights."""
    client, objective, prior = CLIENTS[0], Objective(quadratics.model(), "regression"), priors.Gaussian()
    eta = prior.init(objective.params())
    q, p = (
        e.e_step(objective, prior, eta, client, None, generator(0, "e_step"))[0]
        for e in (inference.Averaged(0.1, 2, 4, 1, 100), inference.Point(0.1, 2, 4))
    )
    assert close(q.phi, p.phi, 1e-12)
    for wrong in ({"burn_in": 5}, {"every": 0}, {"shrinkage": -1.0}):
        with pytest.raises(ValueError, match="need 0 <= burn_in"):
            inference.Averaged(0.1, **wrong)


WRONG: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "1 / rho_n forgotten": lambda f: lambda w, x, rho: f(w, x, rho) / (1 + (len(x) - 1) * rho),
    "the sign of u": lambda f: lambda w, x, rho: -f(w, x, rho),
    "n for n - 1": lambda f: lambda w, x, rho: f(w, x, rho * (len(x) - 1) / len(x)),
    "samples that are not centred": lambda f: lambda w, x, rho: f(w, torch.cat([x, 0 * x[:1]]), rho),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_dense_inverse_catches_the_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaged, "delta", WRONG[mistake](averaged.delta))
    with pytest.raises(AssertionError):
        test_the_line_is_the_dense_inverse(3, 1.0)


def test_without_noise_in_the_steps_it_ends_where_fedavg_does() -> None:
    """Full batches to convergence: all samples are the client's optimum, S = 0, and Delta = (w - optimum) / rho_n."""
    local: dict[str, Any] = {"lr": 0.3, "epochs": 150, "batch_size": None, "weighting": "examples"}
    n, shrinkage = 2, 1.0
    step = fp.server.Damped(1 / (1 + (n - 1) * shrinkage))  # rho_n: back to the mean of the optima in one round
    pa = replace(fp.fedpa(**local, burn_in=148, shrinkage=shrinkage), server=step)
    sizes = torch.tensor([float(len(c.train)) for c in CLIENTS], dtype=torch.float64)
    mean = sizes @ torch.stack([optimum(c) for c in CLIENTS]) / sizes.sum()
    for algorithm in (pa, fp.fedavg(**local)):
        assert torch.allclose(phi(quadratics.run(algorithm, CLIENTS, 2)), mean, rtol=0, atol=1e-6)
    assert (mean - best(CLIENTS, "examples")).abs().max() > 0.1
