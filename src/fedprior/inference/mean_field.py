r"""Mean-field variational Bayes: a Gaussian with a width for every weight, by SGD on draws.

    q = N(m, diag s^2) maximises (1/N_s) [ sum_i E_q log p(y_i | f(x_i; phi)) - zeta KL(q || p(. | eta)) ]
    -KL = log_prob(eta, T(q)) + sum_j log s_j,     up to a constant
    each step: one draw phi = m + s e, e ~ N(0, I), and a step of SGD in (m, log s) (inference/draws.py)

(m, log s) is the client's state, from which its next E-step begins; a new client begins at the prior's point and
`spread`. Running means and other untrained entries keep their width. zeta = 1 is Bayes' rule. Personal predictions are
those of `draws` draws.

    paper   code        shape                    paper   code      shape
    s       exp(wide)   as the parameters        zeta    zeta      scalar

Zhang et al. 2022, arXiv:2206.07977 (pFedBayes), eq. 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors, tree
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Epochs
from fedprior.inference.draws import climb, mixed_draws
from fedprior.objective import Objective


@dataclass(frozen=True)
class MeanField(Epochs):
    """SGD on reparameterised draws, for a prior whose statistics are moments.

    Attributes:
        lr: of m and log s.
        zeta: weight of the divergence from the prior; > 0.
        spread: s of a client never seen, in parameter units; > 0.
        draws: how many models a personal prediction mixes.
    """

    zeta: float = 1.0
    spread: float = 0.1
    draws: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.zeta < math.inf and 0 < self.spread < math.inf and self.draws >= 1):
            raise ValueError(f"need finite zeta, spread > 0 and draws >= 1, got {self}")

    def start(self, prior: Any, eta: Eta) -> posteriors.Gaussian:
        """The prior's point, and `spread`."""
        phi = prior.point(eta)
        return posteriors.Gaussian(phi, tree.map(lambda v: torch.full_like(v, self.spread**-2), phi))

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Gaussian, Params]:
        """A few epochs from where the client's last E-step ended."""
        before = self.start(prior, eta)
        first = tree.map(lambda p: -0.5 * p.log(), before.precision)
        if state is not None:
            before, first = (
                posteriors.Gaussian({k: state[f"m/{k}"] for k in first}, before.precision),
                {k: state[f"wide/{k}"] for k in first},
            )

        def term(m: Params, wide: Params) -> Tensor:
            q = posteriors.Gaussian(m, tree.map(lambda w: (-2 * w).exp(), wide))
            return self.zeta / len(client.train) * (prior.log_prob(eta, prior.stats(q)) + tree.total(wide))

        m, wide = climb(self, objective, before.phi, first, term, client, rng)
        q = posteriors.Gaussian(m, tree.map(lambda w: (-2 * w).exp(), wide))
        return q, {f"m/{k}": v for k, v in m.items()} | {f"wide/{k}": v for k, v in wide.items()}

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """Draws of q, trained once more towards this eta."""
        q, _ = self.e_step(objective, prior, eta, client, state, rng)
        wide = tree.map(lambda p: -0.5 * p.log(), q.precision)
        return mixed_draws(q.phi, {k: wide[k] for k in objective.trainable}, self.draws, rng)
