r"""A client whose personal model is near a prior mean of its own, which it makes out of what it remembers.

    for each mini-batch
        s       "gradient"   s = w_s - reach grad loss(w_s)                         (the paper's lg)
                "memory"     s = w_s - reach (last - theta)                         (meg)
                "meta"       w_s <- w_s - reach' grad loss_2(w_s - reach' grad loss_1(w_s)), then s as in "memory"  (mh)
        theta   by `steps` steps on  loss(theta) + (strength / 2) |theta - s|^2     from w_s ("gradient": from s)
        w_s     <- w_s - outer_lr strength (s - theta)

w_s starts at the prior's point and is the posterior; theta is the client's prediction. The state is theta and last, the
w_s of the client's last round; without one both are w_s, so that s = w_s: pFedMe. reach' = reach / 5.

Shi et al. 2023, arXiv:2310.09183 (pFedBreD, PRIOR), with the spherical Gaussian, the only case of their code: a scaled
exponential-family prior in general has -log p = strength D_f(theta | s), a Bregman divergence. loss_1 and loss_2 are
the halves of the mini-batch here, two mini-batches there. Buffers of w_s are theta's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from fedprior import posteriors, wire
from fedprior.core import Client, Eta, Examples, Params, Prior
from fedprior.inference.ascent import batches, check_steps, detached, leaves
from fedprior.objective import Objective
from fedprior.rng import seeded_globals

Strategy = Literal["gradient", "memory", "meta"]


@dataclass(frozen=True)
class Bregman:
    """Proximal steps around a personal prior mean.

    Attributes:
        lr: of theta, for a loss in nats per example.
        strategy: how the prior mean is made.
        strength: of the pull of theta to s, in nats per example and squared unit.
        outer_lr: of w_s; outer_lr x strength is the fraction of the way from s to theta.
        reach: how far s is from w_s, in gradients or in remembered differences.
        steps: for theta, a mini-batch.
        epochs: passes over the client's examples.
        batch_size: examples a mini-batch; None for all of them.
    """

    lr: float
    strategy: Strategy = "meta"
    strength: float = 15.0
    outer_lr: float = 0.01
    reach: float = 0.05
    steps: int = 5
    epochs: int = 1
    batch_size: int | None = 20

    def __post_init__(self) -> None:
        check_steps(self.lr, self.epochs, self.batch_size)
        fits = self.steps >= 1 and 0 < self.strength < math.inf and 0 < self.outer_lr * self.strength <= 1
        if not fits or self.strategy not in get_args(Strategy) or not 0 <= self.reach < math.inf:
            raise ValueError(
                f"Bregman needs a strategy of {', '.join(get_args(Strategy))}, steps >= 1, strength > 0, "
                f"0 < outer_lr * strength <= 1 and reach >= 0; got {self}"
            )

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        """The prior's point."""
        return posteriors.Point(prior.point(eta))

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Point, Params]:
        """w_s, and the state (theta, w_s)."""
        w, theta = self._train(objective, prior, eta, client, state, rng)
        last = {k: w[k] for k in objective.trainable}
        return posteriors.Point(w), wire.join({"last": last, "theta": theta})

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """The theta after a round's training."""
        return posteriors.Predictive.point(self._train(objective, prior, eta, client, state, rng)[1])

    def _train(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[Params, Params]:
        """(w_s, theta)."""
        w = prior.point(eta)
        last, theta = wire.part(state, "last") or w, wire.part(state, "theta") or w
        objective.train()
        with seeded_globals(rng, client.train.x.device):
            for batch in batches(client.train, self.epochs, self.batch_size, rng, objective.smallest_batch):
                w, s = self._prior_mean(objective, w, last, theta, batch)
                theta = s if self.strategy == "gradient" else w
                for _ in range(self.steps):
                    up, theta = slopes(objective, theta, batch)
                    theta = theta | {
                        k: theta[k] + self.lr * (g + self.strength * (s[k] - theta[k])) for k, g in up.items()
                    }
                move = self.outer_lr * self.strength
                w = theta | {k: w[k] - move * (s[k] - theta[k]) for k in objective.trainable}
        return w, theta

    def _prior_mean(
        self, objective: Objective, w: Params, last: Params, theta: Params, batch: Examples
    ) -> tuple[Params, Params]:
        """(w, s)."""
        if self.strategy == "gradient":
            up, _ = slopes(objective, w, batch)
            return w, w | {k: w[k] + self.reach * g for k, g in up.items()}
        if self.strategy == "meta":
            half = max(len(batch) // 2, min(objective.smallest_batch, len(batch)))
            first, second = Examples(batch.x[:half], batch.y[:half]), Examples(batch.x[-half:], batch.y[-half:])
            up, _ = slopes(objective, w, first)
            up, _ = slopes(objective, w | {k: w[k] + self.reach / 5 * g for k, g in up.items()}, second)
            w = w | {k: w[k] + self.reach / 5 * g for k, g in up.items()}
        return w, w | {k: w[k] - self.reach * (last[k] - theta[k]) for k in objective.trainable}


def slopes(objective: Objective, phi: Params, batch: Examples) -> tuple[Params, Params]:
    """The gradient of the mean log-likelihood at phi, and phi with the buffers that the pass has moved."""
    live, trained = leaves(objective, phi)
    up = torch.autograd.grad(
        objective.log_lik(live, batch.x, batch.y), trained, allow_unused=True, materialize_grads=True
    )
    return dict(zip(objective.trainable, up, strict=True)), detached(live)
