r"""Variational EM on the client: its confidence, then a Gaussian over its head, then the base.

    rho_s^2 = (1/d) [ sum_j sigma_j^2 + |m - mu|^2 ]     m, sigma: as the client's last E-step left them; mu is new
    head     q = N(m, diag sigma^2) maximises  sum_i E_q log p(y_i | f(x_i; psi, phi)) - KL(q || N(mu, rho_s^2 I))
    base     psi by SGD on  sum_i E_q log p(y_i | f(x_i; psi, phi)),  q held

Each line is a step up in one of rho_s, q and psi on the bound of all three. Both phases take one draw of the head a
mini-batch (inference/draws.py) and divide the bound by N_s. The state is q. A client never seen begins at m = mu
and sigma = rho_0. Personal predictions are those of `draws` draws.

Zhu, Ma, Blaschko 2023, arXiv:2305.12557 (pFedVEM); the order of the three lines is that of the paper's code. Ours: one
draw a step in the place of five, mini-batches for the head too, plain SGD, and epochs and rates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors, tree
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Epochs
from fedprior.inference.draws import climb, mixed_draws
from fedprior.objective import Objective
from fedprior.priors.parts import take


@dataclass(frozen=True)
class Confidence(Epochs):
    """MeanField for the head, SGD for the base.

    Attributes:
        lr: of m, log sigma and psi.
        epochs: for the base.
        head_epochs: for the head, before.
        draws: how many models a personal prediction mixes.
    """

    head_epochs: int = 5
    draws: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_epochs < 1 or self.draws < 1:
            raise ValueError(f"need head_epochs >= 1 and draws >= 1, got {self}")

    def start(self, prior: Any, eta: Eta) -> posteriors.Confident:
        """The server's parameters; the head with the width rho_0."""
        if not hasattr(prior, "rho"):
            raise TypeError(
                f"inference.Confidence needs a prior whose clients have a rho, and {type(prior).__name__} has none. "
                "Use the prior Confidence(rho=...), or inference.MeanField(lr=...)."
            )
        phi = prior.point(eta)
        var = {k: torch.full_like(v, prior.rho**2) for k, v in take(phi, prior.names).items()}
        return posteriors.Confident(phi, var, {"c": next(iter(phi.values())).new_ones(())})

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Confident, Params]:
        """The client's confidence, head and base."""
        q = self.start(prior, eta)
        if state is not None:
            m, var = ({k: state[f"{part}/{k}"] for k in q.var} for part in ("m", "var"))
            q = replace(q, phi=q.phi | m, var=var)
        c = prior.confidence(eta, q)

        def term(m: Params, wide: Params) -> Tensor:
            now = posteriors.Confident(take(m, q.var), tree.map(lambda w: (2 * w).exp(), wide), c)
            return (prior.log_prob(eta, prior.stats(now)) + tree.total(wide)) / len(client.train)

        m, wide = q.phi, tree.map(lambda v: 0.5 * v.log(), q.var)
        for epochs, names in ((self.head_epochs, q.var.keys()), (self.epochs, q.phi.keys() - q.var.keys())):
            if names.isdisjoint(objective.trainable):
                continue  # a head without a base
            m, wide = climb(replace(self, epochs=epochs), objective, m, wide, term, client, rng, names)
        q = posteriors.Confident(m, tree.map(lambda w: (2 * w).exp(), wide), c)
        return q, {f"m/{k}": m[k] for k in q.var} | {f"var/{k}": v for k, v in q.var.items()}

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """Draws of q, trained once more towards this eta."""
        q, _ = self.e_step(objective, prior, eta, client, state, rng)
        return mixed_draws(q.phi, tree.map(lambda v: 0.5 * v.log(), q.var), self.draws, rng)
