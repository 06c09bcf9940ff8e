r"""Hard EM under a scale mixture: SGD whose pull is that of the current expected precisions.

    phi by SGD from w on  (1/N_s) sum_i log p(y_i | f(x_i; phi)) - (1/2 N_s) sum_j c_j (phi_j - w_j)^2
    c = prior.confidence(eta, phi), anew at every step

The inner E-step (c given phi) costs one expression: there is no reason to take it less often than the step in phi.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedprior import posteriors
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Epochs
from fedprior.inference.point import Point
from fedprior.inference.viewed import Viewed
from fedprior.objective import Objective


@dataclass(frozen=True)
class Reweighted(Epochs):
    """SGD, reweighted."""

    def start(self, prior: Any, eta: Eta) -> posteriors.Scaled:
        """The prior's point."""
        if not hasattr(prior, "confidence"):
            raise TypeError(
                f"inference.Reweighted needs a prior that is a mixture over scales, and {type(prior).__name__} is none."
                " Use the prior ScaleMixture(...), or inference.Point(lr=...)."
            )
        phi = prior.point(eta)
        return posteriors.Scaled(phi, prior.confidence(eta, phi))

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Scaled, Params | None]:
        """A few epochs from the prior's point; no personal state."""
        view = Viewed(prior, lambda phi: posteriors.Scaled(phi, prior.confidence(eta, phi)))
        q, _ = Point(self.lr, self.epochs, self.batch_size).e_step(objective, view, eta, client, None, rng)
        return posteriors.Scaled(q.phi, prior.confidence(eta, q.phi)), state
