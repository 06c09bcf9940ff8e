r"""FedPA: a Gaussian posterior from averages of SGD's iterates, of which only the slope of its density at w is sent.

    x_1 .. x_n   means of `every` successive iterates each, after `burn_in` epochs          (IASG samples)
    mu = mean x_i,   S = sum_i (x_i - mu)(x_i - mu)' / (n - 1),   rho_n = 1 / (1 + (n - 1) shrinkage)
    Sigma = rho_n I + (1 - rho_n) S = rho_n (I + shrinkage X'X),     X the centred samples, (n, d)
    Delta = Sigma^-1 (w - mu) = [u - shrinkage X' (I_n + shrinkage X X')^-1 X u] / rho_n,    u = w - mu
    q = the point w - Delta

The prior is a flat Gaussian: its M-step, the mean of w - Delta_s, is the step w - mean Delta_s of the paper. Where the
moments are exact, the fixed point sum_s Sigma_s^-1 (w - mu_s) = 0 is the mean of the product of posteriors. One sample
is FedAvg. The line for Delta is Woodbury's identity with an n x n system, O(n^2 d); the paper's recursion by rank-one
updates has the same cost and the same result. A client with too few steps for a sample sends its last iterate.

    paper    code        shape                    paper    code         shape
    rho      shrinkage   scalar, >= 0             l        n            number of samples

Al-Shedivat, Gillenwater, Xing, Rostamizadeh 2021, arXiv:2010.05273. The paper begins with rounds of FedAvg: run
fedavg first, then fedpa from its model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedprior import posteriors
from fedprior.core import Client, Eta, Params, Prior
from fedprior.inference.ascent import Descent, ascend, batch_sizes, check_steps, detached, leaves
from fedprior.objective import Objective


@dataclass(frozen=True)
class Averaged:
    """SGD whose iterates are samples.

    Attributes:
        lr: learning rate, for a loss in nats per example.
        epochs: passes over the client's examples, burn-in included.
        batch_size: examples a step; None for all of them.
        burn_in: epochs before the first sample; less than `epochs`.
        every: steps that are averaged to one sample; None for an epoch's.
        shrinkage: rho, towards the identity where it is small; >= 0.
    """

    lr: float
    epochs: int = 5
    batch_size: int | None = 20
    burn_in: int = 1
    every: int | None = None
    shrinkage: float = 0.01

    def __post_init__(self) -> None:
        check_steps(self.lr, self.epochs, self.batch_size)
        every = 1 if self.every is None else self.every
        if not (0 <= self.burn_in < self.epochs and every >= 1 and 0 <= self.shrinkage < math.inf):
            raise ValueError(f"need 0 <= burn_in < epochs, every >= 1 (or None) and shrinkage >= 0, got {self}")

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        """The prior's point."""
        return posteriors.Point(prior.point(eta))

    def e_step(
        self, objective: Objective, prior: Prior, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Point, Params | None]:
        """w - Delta; what is not trained (running means) is as it is at the end."""
        phi, trained = leaves(objective, prior.point(eta))
        w = _vector(trained)
        an_epoch = len(batch_sizes(len(client.train), self.batch_size, objective.smallest_batch))
        every, wait = self.every or an_epoch, self.burn_in * an_epoch
        samples: list[Tensor] = []
        steps, mean = 0, torch.zeros_like(w)

        def after_step() -> None:
            nonlocal steps, mean
            steps += 1
            if steps > wait:
                mean = mean + _vector(trained) / every
                if (steps - wait) % every == 0:
                    samples.append(mean)
                    mean = torch.zeros_like(w)

        objective.train()
        with objective.holding(phi):
            ascend(
                lambda x, y: objective.log_lik(phi, x, y),
                client.train,
                [Descent(trained, self.lr)],
                self.epochs,
                self.batch_size,
                rng,
                after_step,
                objective.smallest_batch,
            )
        target = w - delta(w, torch.stack(samples or [_vector(trained)]), self.shrinkage)
        parts = target.split([v.numel() for v in trained])
        moved = {k: part.view_as(phi[k]) for k, part in zip(objective.trainable, parts, strict=True)}
        return posteriors.Point(detached(phi) | moved), state


def delta(w: Tensor, samples: Tensor, shrinkage: float) -> Tensor:
    """Sigma^-1 (w - mu), (d,), from samples (n, d)."""
    n, mu = len(samples), samples.mean(0)
    x, u = samples - mu, w - mu
    small = torch.eye(n, dtype=x.dtype, device=x.device) + shrinkage * x @ x.T
    return (1 + (n - 1) * shrinkage) * (u - shrinkage * x.T @ torch.linalg.solve(small, x @ u))


def _vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([v.detach().flatten() for v in tensors])
