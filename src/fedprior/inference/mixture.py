r"""E-steps of a mixture: which of K models a client's examples, or the whole client, come from; then one on each.

    soft (FedEM)   r_ik = pi_k p(y_i | f(x_i; w_k)) / sum_j pi_j p(y_i | f(x_i; w_j))
                   with the client's last pi; the server's shares, for a new client
    hard (IFCA)    r_ik = 1 for the k with the largest sum_i log p(y_i | f(x_i; w_k)), 0 for the others
    pi_k = (1/N_s) sum_i r_ik
    phi_k by an E-step from w_k (Point, say) on
        (1/N_s) sum_i (r_ik / pi_k) log p(y_i | f(x_i; phi_k)) + (1/N_s) log p(phi_k | eta_k)

pi is the personal state of a soft client, and a hard one keeps nothing. A component with pi_k = 0 is not trained.
With one full-batch step, and clients that count by examples, w_k moves by lr times the gradient of the mean of all
examples' log-likelihoods weighted by r_ik: gradient EM on the pooled data. Marfoq's code divides by N_s and not by
N_s pi_k, and then weighs clients by N_s: the same direction, at pi_k times the rate.

Personal predictions are sum_k pi_k p(y | f(x; phi_k)): the pi that EM finds for the server's components, and one E-step
of each from there, as a client of any other algorithm adapts. Marfoq's and Ghosh's predict with the w_k themselves.

Marfoq et al. 2021, arXiv:2108.10252, Algorithm 1; Ghosh et al. 2020, arXiv:2006.04088, Algorithm 1 (model averaging).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors
from fedprior.core import Client, Eta, Examples, Inference, Params
from fedprior.losses import Loss
from fedprior.objective import Objective
from fedprior.priors.parts import part_etas

_PASSES = 100  # EM for pi alone is concave, and costs no pass over the data
_CHUNK = 1000


@dataclass(frozen=True)
class Mixture:
    """Responsibilities at the server's components, then an E-step of each that has any.

    Attributes:
        each: the E-step of a component, which keeps no state.
        hard: a client has one component, not a share in each.
    """

    each: Inference
    hard: bool = False

    def start(self, prior: Any, eta: Eta) -> posteriors.Mixed:
        """The server's components and shares."""
        if not hasattr(prior, "points"):
            raise TypeError(
                f"inference.Mixture needs a prior with components, and {type(prior).__name__} has one. "
                "Use the prior Mixture(components=...), or inference.Point(lr=...)."
            )
        return posteriors.Mixed(tuple(self.each.start(prior.prior, part) for part in part_etas(eta)), eta.share)

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Mixed, Params | None]:
        """The client's components and pi."""
        scores = log_likelihoods(objective, prior.points(eta), client.train)
        q = self._adapted(objective, prior, eta, client, self._responsibilities(scores, _pi(eta, state)), rng)
        return q, state if self.hard else q.pi

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """The components that the client has a part in, adapted to it."""
        pi, scores = _pi(eta, state), log_likelihoods(objective, prior.points(eta), client.train)
        for _ in range(0 if self.hard else _PASSES):
            pi = self._responsibilities(scores, pi).mean(0)
        q = self._adapted(objective, prior, eta, client, self._responsibilities(scores, pi), rng)
        weights = q.pi["pi"].tolist()
        own = [k for k, weight in enumerate(weights) if weight > 0]
        etas, whole = part_etas(eta), getattr(prior.prior, "whole", lambda part, phi: phi)
        models = tuple(whole(etas[k], q.parts[k].mean()) for k in own)
        return posteriors.Predictive(tuple(weights[k] for k in own), models)

    def _adapted(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, r: Tensor, rng: torch.Generator
    ) -> posteriors.Mixed:
        """pi, and an E-step of each component that has a part in the client."""
        pi = r.mean(0)
        parts = [
            self._train(objective, prior.prior, part, client, r[:, k] / pi[k], rng)
            if pi[k] > 0
            else self.each.start(prior.prior, part)
            for k, part in enumerate(part_etas(eta))
        ]
        return posteriors.Mixed(tuple(parts), {"pi": pi})

    def _responsibilities(self, scores: Tensor, pi: Tensor) -> Tensor:
        """r, (N_s, K), from log-likelihoods (N_s, K)."""
        if self.hard:
            best = torch.zeros_like(pi)
            best[scores.sum(0).argmax()] = 1
            return best.expand_as(scores)
        return (scores + pi.log()).softmax(1)

    def _train(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, weights: Tensor, rng: torch.Generator
    ) -> Any:
        """The E-step on weighted examples: their rows stand in for their targets. Of a hard client, as they are."""
        if self.hard:
            return self.each.e_step(objective, prior, eta, client, None, rng)[0]

        def log_lik(outputs: Tensor, rows: Tensor) -> Tensor:
            return weights[rows] * objective.loss.log_lik(outputs, client.train.y[rows])

        rows = torch.arange(len(client.train), device=client.train.y.device)
        own = Client(client.index, client.name, Examples(client.train.x, rows))
        return self.each.e_step(objective.with_loss(Loss(log_lik)), prior, eta, own, None, rng)[0]


@torch.no_grad()
def log_likelihoods(objective: Objective, models: list[Params], data: Examples) -> Tensor:
    """log p(y_i | f(x_i; w_k)), (N_s, K), in evaluation mode."""
    objective.train(False)

    def of(phi: Params) -> Tensor:
        batches = zip(data.x.split(_CHUNK), data.y.split(_CHUNK), strict=True)
        return torch.cat([objective.loss.log_lik(objective.outputs(phi, x), y) for x, y in batches])

    return torch.stack([of(phi) for phi in models], 1)


def _pi(eta: Eta, state: Params | None) -> Tensor:
    """The client's last, or the server's shares for a new client."""
    return eta.share["pi"] if state is None else state["pi"]
