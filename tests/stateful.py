"""E-steps around Point: one whose clients count their own rounds and let it show, and one that is watched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fedprior import Client, Params, inference, posteriors
from fedprior.core import Eta, Prior
from fedprior.objective import Objective


@dataclass(frozen=True)
class Counting:
    """Point, plus 0.001 x (rounds that the client took part in) on every parameter."""

    point: inference.Point

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        return self.point.start(prior, eta)

    def e_step(
        self, objective: Objective, prior: Prior, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[Any, Params | None]:
        q, _ = self.point.e_step(objective, prior, eta, client, None, rng)
        rounds = torch.ones(1, device=client.train.x.device) if state is None else state["rounds"] + 1
        return posteriors.Point({k: v + 0.001 * rounds for k, v in q.phi.items()}), {"rounds": rounds}


@dataclass(frozen=True)
class Watched:
    """Point, and a list of (client's index, the eta that it received)."""

    point: inference.Point
    seen: list[tuple[int, Eta]] = field(default_factory=list, repr=False)

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        return self.point.start(prior, eta)

    def e_step(
        self, objective: Objective, prior: Prior, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[Any, Params | None]:
        self.seen.append((client.index, eta))
        return self.point.e_step(objective, prior, eta, client, state, rng)
