r"""A client whose loss is a Moreau envelope: a personal model near a copy of the server's, and the copy follows it.

    F(w) = min_theta  -(1/N_s) sum_i log p(y_i | f(x_i; theta)) + (strength/2) |theta - w|^2
    grad F(w) = strength (w - theta(w))

    for each mini-batch     theta   by `steps` steps of SGD on the mini-batch's F, from the last theta
                            w_s     <- w_s - outer_lr strength (w_s - theta)

w_s is the posterior (a point), theta the client's prediction; both start at the prior's point in every round. In the
hierarchical model theta ~ N(w_s, 1/(N_s strength)), and w_s ~ N(w, .) with a flat pull. Buffers of w_s are theta's.

Dinh, Tran, Nguyen 2020, arXiv:2006.08848, Algorithm 1 (pFedMe); `strength` is its lambda, `outer_lr` its eta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors
from fedprior.core import Client, Eta, Params, Prior
from fedprior.inference.ascent import Descent, ascend, check_steps, detached, leaves
from fedprior.objective import Objective
from fedprior.priors.gaussian import Gaussian


@dataclass(frozen=True)
class Moreau:
    """Proximal steps for theta, gradient steps of the envelope for w_s.

    Attributes:
        lr: of theta, for a loss in nats per example.
        strength: of the pull of theta to w_s, in nats per example and squared unit.
        outer_lr: of w_s; outer_lr x strength is the fraction of the way to theta.
        steps: for theta, a mini-batch.
        epochs: passes over the client's examples.
        batch_size: examples a mini-batch; None for all of them.
    """

    lr: float
    strength: float = 15.0
    outer_lr: float = 0.02
    steps: int = 5
    epochs: int = 1
    batch_size: int | None = 20

    def __post_init__(self) -> None:
        check_steps(self.lr, self.epochs, self.batch_size)
        if self.steps < 1 or not (0 < self.strength < math.inf and 0 < self.outer_lr * self.strength <= 1):
            raise ValueError(
                "Moreau needs steps >= 1, strength > 0 and 0 < outer_lr * strength <= 1, a fraction of the way to "
                f"theta; got steps={self.steps}, strength={self.strength}, outer_lr={self.outer_lr}"
            )

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        """The prior's point."""
        return posteriors.Point(prior.point(eta))

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[Any, Params | None]:
        """w_s; no state."""
        w, _ = self._train(objective, prior, eta, client, rng)
        return posteriors.Point(w), state

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """The theta after a round's training."""
        _, theta = self._train(objective, prior, eta, client, rng)
        return posteriors.Predictive.point(theta)

    def _train(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, rng: torch.Generator
    ) -> tuple[Params, Params]:
        """(w_s, theta)."""
        examples = len(client.train)
        w, pull = prior.point(eta), Gaussian(self.strength * examples)
        theta, trained = leaves(objective, w)
        q = posteriors.Point(theta)

        def bound(x: Tensor, y: Tensor) -> Tensor:
            return objective.log_lik(theta, x, y) + pull.log_prob(pull.init(w), pull.stats(q)) / examples

        @torch.no_grad()
        def follow() -> None:
            nonlocal w
            move = self.outer_lr * self.strength
            w = {k: torch.lerp(w[k], v, 1.0 if k in objective.buffers else move) for k, v in theta.items()}

        objective.train()
        smallest, optimizers = objective.smallest_batch, [Descent(trained, self.lr)]
        with objective.holding(theta):
            ascend(
                bound, client.train, optimizers, self.epochs, self.batch_size, rng, follow, smallest, steps=self.steps
            )
        return detached(w), detached(theta)
