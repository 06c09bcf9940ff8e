r"""Samples of the posterior by Langevin steps, and a student that learns their mixed predictions.

    teacher, per mini-batch   phi <- phi + (lr / 2) g + sqrt(temperature lr / N_s) xi          xi ~ N(0, I)
                              g = grad [mean log-likelihood - (decay / 2) |phi|^2]
    student, per mini-batch   ascend  sum_c p(c | x; phi) log p(c | x; student)                x + N(0, 0.001^2)

An epoch of the teacher, then one of the student, `epochs` times: the student sees one sample of the posterior after the
other, and learns their average. At temperature 1 and for small lr phi has the law p(phi | D_s), with the prior
N(0, 1 / (N_s decay)). For y = <x, phi> + unit noise, full batches and decay 0, the stationary variance along an
eigenvector of the mean loss's Hessian with eigenvalue h is 1 / (N_s h (1 - lr h / 4)).

Bhatt, Gupta, Rai 2023, arXiv:2206.07562 (FedPPD). Their noise is 2 sqrt(lr) / N_s, a temperature of 4 / N_s, which is
very cold; 1 is ours. The teacher goes on from the server's mean of teachers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Descent, Epochs, ascend, check_steps, detached, leaves
from fedprior.inference.walk import walk
from fedprior.objective import Objective


@dataclass(frozen=True)
class Langevin:
    """A Langevin chain and its student.

    Attributes:
        lr: of the teacher, for a loss in nats per example.
        student_lr: of the student.
        epochs: passes over the client's examples, each followed by one of the student's.
        batch_size: examples a step; None for all of them.
        temperature: of the posterior; 0 is SGD at half the rate.
        decay: precision of the prior per example.
    """

    lr: float
    student_lr: float
    epochs: int = 1
    batch_size: int | None = 20
    temperature: float = 1.0
    decay: float = 1e-4

    def __post_init__(self) -> None:
        check_steps(self.lr, self.epochs, self.batch_size)
        check_steps(self.student_lr, self.epochs, self.batch_size)
        if not (0 <= self.temperature < math.inf and 0 <= self.decay < math.inf):
            raise ValueError(f"temperature and decay must be finite and >= 0, got {self.temperature} and {self.decay}")

    def start(self, prior: Any, eta: Eta) -> posteriors.Distilled:
        """Teacher and student of the server."""
        if not hasattr(eta, "student"):
            raise TypeError(
                f"inference.Langevin needs a prior with a student, and {type(prior).__name__} has none. Use the prior "
                "Distilled(), or inference.Point(lr=...)."
            )
        return posteriors.Distilled(eta.mean, eta.student)

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Distilled, Params | None]:
        """The last sample, and the student; no personal state."""
        start = self.start(prior, eta)
        teacher, (student, trained) = start.phi, leaves(objective, start.student)
        if objective.loss.probabilities is None:
            raise ValueError(f"distilling needs probabilities of classes, and the loss {objective.loss} gives none")
        for teacher in self.samples(objective, start.phi, client, rng):
            self._learn(objective, student, trained, teacher, client, rng)
        return posteriors.Distilled(detached(teacher), detached(student)), state

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """The student after a round's training."""
        return posteriors.Predictive.point(self.e_step(objective, prior, eta, client, state, rng)[0].student)

    def samples(self, objective: Objective, phi: Params, client: Client, rng: torch.Generator) -> Iterator[Params]:
        """The chain from phi, after each epoch."""

        def term(phi: Params) -> Tensor | float:
            return -0.5 * self.decay * sum(phi[k].square().sum() for k in objective.trainable) if self.decay else 0.0

        how = Epochs(self.lr / 2, self.epochs, self.batch_size)
        return walk(how, objective, phi, term, client, rng, temperature=self.temperature)

    def _learn(
        self,
        objective: Objective,
        student: Params,
        trained: list[Tensor],
        teacher: Params,
        client: Client,
        rng: torch.Generator,
    ) -> None:
        """An epoch of the student."""
        probabilities: Any = objective.loss.probabilities

        def bound(x: Tensor, y: Tensor) -> Tensor:
            if x.is_floating_point():
                x = x + 1e-3 * torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)
            with torch.no_grad():
                p = probabilities(objective.outputs({k: v.clone() for k, v in teacher.items()}, x))
            gain = p * probabilities(objective.outputs(student, x)).clamp(min=1e-30).log()
            return gain.sum() / len(x)

        objective.train()
        smallest, optimizers = objective.smallest_batch, [Descent(trained, self.student_lr)]
        ascend(bound, client.train, optimizers, 1, self.batch_size, rng, smallest=smallest)
