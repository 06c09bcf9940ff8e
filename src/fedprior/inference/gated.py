r"""A point in the weights and a Bernoulli gate per unit, trained together through hard-concrete gates.

    z, pi = hard-concrete gates and P(z > 0), both functions of log_alpha     (gates.py)
    maximise  (1/N_s) sum_i E_z[ log p(y_i | f(x_i; phi * z)) ] + (1/N_s) log_prob(eta, E_q[T])

by SGD on phi and Adam on log_alpha, with one draw of z a mini-batch; pi starts at theta. The entropy of q(z)
is dropped (the hard-EM limit), so log_alpha is clamped. At the end every gate is drawn
once, z ~ Bernoulli(pi): the client sends only the weights of open units, and the M-step stays unbiased.
Removed units are cut out first (slim.py): the client trains a model of the size of what is left.

    paper   code          shape
    pi      keep          group -> (units,)

Louizos et al. 2021, arXiv:2111.10192, section 4; gates: Louizos, Welling, Kingma 2018, arXiv:1712.01312.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors, structure, tree
from fedprior.core import Client, Eta, Params
from fedprior.gates import BOUND, hard_concrete, keep_probability, log_alpha_for, uniform
from fedprior.inference.ascent import Epochs, ascend, detached, leaves, what_is_left
from fedprior.objective import Objective


@dataclass(frozen=True)
class Gated(Epochs):
    """SGD on the weights, Adam on the gates.

    Attributes:
        lr: of the weights.
        gate_lr: Adam's learning rate for log_alpha.
        draw: send one draw of the gates (sparse, unbiased) rather than their probabilities (dense).
    """

    gate_lr: float = 0.05
    draw: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gate_lr < math.inf:
            raise ValueError(f"need gate_lr > 0, got {self.gate_lr}")

    def start(self, prior: Any, eta: Eta) -> posteriors.Gated:
        """The prior's weights and gate probabilities."""
        if not hasattr(prior, "groups"):
            raise TypeError(
                f"inference.Gated needs a prior with gates, and {type(prior).__name__} has none. "
                "Use the prior SpikeSlab(lambda_0=...), or inference.Point(lr=...)."
            )
        return posteriors.Gated(eta.mean, eta.keep, eta.keep)

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[Any, Params | None]:
        """A few epochs on what is left of the model; no personal state."""
        cut, small, small_prior, small_eta = what_is_left(objective, prior, eta)

        def noise() -> Params:  # drawn for all units: the numbers do not depend on which are left
            return cut.units(tree.map(lambda k: uniform(k, rng), eta.keep))

        q = self._train(small, small_prior, small_eta, client, rng, noise)
        phi = cut.scatter(q.phi)
        return posteriors.Gated(phi, cut.all_units(q.keep), cut.all_units(q.gate)), state

    def _train(
        self,
        objective: Objective,
        prior: Any,
        eta: Eta,
        client: Client,
        rng: torch.Generator,
        noise: Callable[[], Params],
    ) -> posteriors.Gated:
        phi, trained = leaves(objective, eta.mean)
        log_alpha = tree.map(lambda k: log_alpha_for(k).requires_grad_(), eta.keep)
        examples = len(client.train)

        def bound(x: Tensor, y: Tensor) -> Tensor:
            z, pi = tree.map(hard_concrete, log_alpha, noise()), tree.map(keep_probability, log_alpha)
            prior_term = prior.log_prob(eta, prior.stats(posteriors.Gated(phi, pi, pi)))
            return objective.log_lik(structure.close_gates(prior.groups, z, phi), x, y) + prior_term / examples

        def clamp() -> None:
            for a in log_alpha.values():
                a.data.clamp_(-BOUND, BOUND)

        optimizers = [
            torch.optim.SGD(trained, lr=self.lr),
            torch.optim.Adam(list(log_alpha.values()), lr=self.gate_lr),
        ]
        objective.train()
        smallest = objective.smallest_batch
        ascend(bound, client.train, optimizers, self.epochs, self.batch_size, rng, clamp, smallest)
        pi = detached(tree.map(keep_probability, log_alpha))
        gate = tree.map(lambda u, k: (u < k).to(k), noise(), pi) if self.draw else pi
        return posteriors.Gated(detached(phi), pi, gate)
