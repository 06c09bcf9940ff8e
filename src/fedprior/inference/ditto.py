r"""Two models a client: one for the server, and a personal one that is pulled to the server's.

    w_s   the E-step of `shared` from eta: the posterior, and all that the server learns
    v_s   maximises  (1/N_s) sum_i log p(y_i | f(x_i; v)) - (strength/2) |v - w|^2      w = the point of eta

v_s is the client's state; it starts at w, and never enters the sum. In the hierarchical model it is a hard E-step for
phi_s ~ N(w, 1/(N_s strength)) whose result is not sent: a "cut" model.

Li et al. 2021, arXiv:2012.04221, Algorithm 1 (Ditto); `strength` is its lambda.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fedprior import posteriors
from fedprior.core import Client, Eta, Params, Prior
from fedprior.inference.point import Point
from fedprior.objective import Objective
from fedprior.priors.gaussian import Gaussian


@dataclass(frozen=True)
class Ditto:
    """Point for the server's model, and Point with a pull for the client's own.

    Attributes:
        shared: the E-step of w_s.
        own: that of v_s.
        strength: of the pull, in nats per example and squared unit; 0 leaves v_s alone once it has started.
    """

    shared: Point
    own: Point
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength must be a finite number >= 0, got {self.strength}")

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        """The prior's point."""
        return self.shared.start(prior, eta)

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[Any, Params]:
        """w_s, and the state v_s."""
        q, _ = self.shared.e_step(objective, prior, eta, client, None, rng)
        return q, self._own(objective, prior, eta, client, state, rng)

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """v_s, trained once more towards this eta."""
        return posteriors.Predictive.point(self._own(objective, prior, eta, client, state, rng))

    def _own(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> Params:
        pull, w = Gaussian(self.strength * len(client.train)), prior.point(eta)
        return self.own.train(objective, pull, pull.init(w), client, rng, start=state)
