r"""Hard EM with a linear term of the client's own, which it keeps between its rounds: SCAFFOLD and FedDyn.

    phi by SGD from w on  (1/N_s) sum_i log p(y_i | f(x_i; phi)) + log_prob(eta, T(phi))      T with <tilt, phi> in it
    tilt = prior.tilt(eta, own)      own' = prior.own(eta, own, phi, path)      path = lr x number of steps

`own` is the personal state: a vector as the parameters, None for a new client. The prior's units are per example here.
Running means and other untrained entries have no slope: theirs is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedprior import posteriors, tree
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Epochs, batch_sizes
from fedprior.inference.point import Point
from fedprior.inference.viewed import Viewed
from fedprior.objective import Objective


@dataclass(frozen=True)
class Tilted(Epochs):
    """SGD, tilted."""

    def start(self, prior: Any, eta: Eta) -> posteriors.Tilted:
        """The prior's point, without a tilt."""
        if not hasattr(prior, "tilt"):
            raise TypeError(
                f"inference.Tilted needs a prior with a linear term, and {type(prior).__name__} has none. "
                "Use the prior Scaffold() or FedDyn(alpha=...), or inference.Point(lr=...)."
            )
        zeros = tree.map(torch.zeros_like, prior.point(eta))
        return posteriors.Tilted(prior.point(eta), zeros, zeros, _new(zeros, 0.0))

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Tilted, Params]:
        """A few epochs from the prior's point; the state is the client's own vector."""
        before = self.start(prior, eta)
        tilt = prior.tilt(eta, state)
        view = Viewed(prior, lambda phi: posteriors.Tilted(phi, tilt, before.step, before.new), len(client.train))
        q, _ = Point(self.lr, self.epochs, self.batch_size).e_step(objective, view, eta, client, None, rng)
        sizes = batch_sizes(len(client.train), self.batch_size, objective.smallest_batch)
        moved = prior.own(eta, state, q.phi, self.lr * self.epochs * len(sizes))
        own = {k: v if k in objective.trainable else torch.zeros_like(v) for k, v in moved.items()}
        step = own if state is None else tree.map(torch.sub, own, state)
        return posteriors.Tilted(q.phi, own, step, _new(own, float(state is None))), own


def _new(like: Params, count: float) -> Params:
    return {"clients": next(iter(like.values())).new_tensor(count)}
