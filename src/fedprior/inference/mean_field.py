r"""Mean-field variational Bayes: a Gaussian with a width for every weight, by SGD on draws.

    q = N(m, diag s^2) maximises (1/N_s) [ sum_i E_q log p(y_i | f(x_i; phi)) - zeta KL(q || p(. | eta)) ]
    -KL = log_prob(eta, T(q)) + sum_j log s_j,     up to a constant
    each step: one draw phi = m + s e, e ~ N(0, I), and a step of SGD in (m, log s)

(m, log s) is the client's state, from which its next E-step begins; a new client begins at the prior's point and
`spread`. Running means and other untrained entries keep their width. zeta = 1 is Bayes' rule. Personal predictions are
those of `draws` draws.

    paper   code        shape                    paper   code      shape
    s       exp(wide)   as the parameters        zeta    zeta      scalar

Zhang et al. 2022, arXiv:2206.07977 (pFedBayes), eq. 5; Blundell et al. 2015, arXiv:1505.05424.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors, tree
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Descent, Epochs, ascend, detached, leaves
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
        (m, trained), (wide, widths) = leaves(objective, before.phi), leaves(objective, first)

        def bound(x: Tensor, y: Tensor) -> Tensor:
            q = posteriors.Gaussian(m, tree.map(lambda w: (-2 * w).exp(), wide))
            minus_kl = prior.log_prob(eta, prior.stats(q)) + torch.stack([w.sum() for w in widths]).sum()
            phi = m | draw(m, wide, objective.trainable, rng)
            return objective.log_lik(phi, x, y) + self.zeta / len(client.train) * minus_kl

        objective.train()
        optimizers = [Descent([*trained, *widths], self.lr)]
        smallest = objective.smallest_batch
        ascend(bound, client.train, optimizers, self.epochs, self.batch_size, rng, smallest=smallest)
        m, wide = detached(m), detached(wide)
        q = posteriors.Gaussian(m, tree.map(lambda w: (-2 * w).exp(), wide))
        return q, {f"m/{k}": v for k, v in m.items()} | {f"wide/{k}": v for k, v in wide.items()}

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """Draws of q, trained once more towards this eta."""
        q, _ = self.e_step(objective, prior, eta, client, state, rng)
        wide = tree.map(lambda p: -0.5 * p.log(), q.precision)
        models = [q.phi | draw(q.phi, wide, objective.trainable, rng) for _ in range(self.draws)]
        return posteriors.Predictive.equal(models)


def draw(m: Params, wide: Params, names: tuple[str, ...], rng: torch.Generator) -> Params:
    """m + exp(wide) e of the parameters `names`."""
    noise = {k: torch.randn(m[k].shape, generator=rng, dtype=m[k].dtype).to(m[k].device) for k in names}
    return {k: m[k] + wide[k].exp() * e for k, e in noise.items()}
