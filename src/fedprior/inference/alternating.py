r"""Hard EM in two phases: first the parameters that the client keeps for itself, then those that it shares.

    phi = (own, shared)
    own      SGD on the bound of Point, shared held
    shared   SGD on the same bound, own held

Buffers (running moments) move in both. Collins et al. 2021, arXiv:2102.07078, Algorithm 1 (FedRep).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedprior import posteriors
from fedprior.core import Client, Eta, Params
from fedprior.inference.point import Point
from fedprior.objective import Objective


@dataclass(frozen=True)
class Alternating:
    """Point, twice.

    Attributes:
        own: trains what the prior's `kept` names.
        shared: trains the rest.
    """

    own: Point
    shared: Point

    def start(self, prior: Any, eta: Eta) -> posteriors.Point:
        """The prior's point."""
        if not hasattr(prior, "kept"):
            raise TypeError(
                f"inference.Alternating needs a prior with personal parameters, and {type(prior).__name__} has none. "
                "Use the prior Split({'@head': Personal(), '*': Gaussian()}), or inference.Point(lr=...)."
            )
        return posteriors.Point(prior.point(eta))

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[Any, Params | None]:
        """Both phases, from the prior's point; no state of its own."""
        start = self.start(prior, eta)
        own = prior.kept(start).keys()
        phi = self.own.train(objective, prior, eta, client, rng, start.phi, own)
        return posteriors.Point(self.shared.train(objective, prior, eta, client, rng, phi, phi.keys() - own)), state
