r"""A mixture of Gaussians as the prior of one model: hard EM in the weights, soft in the component.

    phi_s by SGD from the r_k with the largest sum_i log p(y_i | f(x_i; r_k)) on
        (1/N_s) sum_i log p(y_i | f(x_i; phi)) + (1/N_s) log sum_k exp(-(precision/2) |phi - r_k|^2)
    c_sk = softmax_k(-(precision/2) |phi_s - r_k|^2)

The second term's slope is that of the bound at c(phi): precision sum_k c_k (r_k - phi). Distances are those of trained
parameters. In many dimensions c is all but one-hot, and the start decides: it is the centre that fits best.

Kim, Hospedales 2023, arXiv:2305.04979 (mixture). The start is ours, as that of IFCA, arXiv:2006.04088.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Epochs
from fedprior.inference.mixture import log_likelihoods
from fedprior.inference.point import Point
from fedprior.objective import Objective
from fedprior.priors.gaussian import Gaussian


@dataclass(frozen=True)
class Centres(Epochs):
    """SGD from the centre that fits best, with a pull to all."""

    def start(self, prior: Any, eta: Eta) -> posteriors.Mixed:
        """The server's centres and shares."""
        if not hasattr(prior, "ridge"):
            raise TypeError(
                f"inference.Centres needs a prior with centres, and {type(prior).__name__} has none. "
                "Use the prior Centres(components=...), or inference.Point(lr=...)."
            )
        return posteriors.Mixed(tuple(posteriors.Point(r) for r in prior.points(eta)), eta.share)

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Mixed, Params | None]:
        """The client's model, as often as there are centres, and c; no personal state."""
        phi = self._train(objective, prior, eta, client, rng)
        c = scores(objective, prior.prior.precision, prior.points(eta), phi).softmax(0)
        return posteriors.Mixed((posteriors.Point(phi),) * len(c), {"pi": c}), state

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """The model after a round's training."""
        return posteriors.Predictive.point(self._train(objective, prior, eta, client, rng))

    def _train(self, objective: Objective, prior: Any, eta: Eta, client: Client, rng: torch.Generator) -> Params:
        centres = prior.points(eta)
        best = int(log_likelihoods(objective, centres, client.train).sum(0).argmax())

        def penalty(objective: Objective, phi: Params) -> Tensor:
            return -scores(objective, prior.prior.precision, centres, phi).logsumexp(0)

        flat = Gaussian()
        point = Point(self.lr, self.epochs, self.batch_size, penalty=penalty)
        return point.train(objective, flat, flat.init(centres[best]), client, rng)


def scores(objective: Objective, precision: float, centres: list[Params], phi: Params) -> Tensor:
    """-(precision/2) |phi - r_k|^2 of trained parameters, (K,)."""
    squares = [torch.stack([(phi[k] - r[k]).square().sum() for k in objective.trainable]).sum() for r in centres]
    return -0.5 * precision * torch.stack(squares)
