r"""The E-step of rules: the exact posterior over a client's rules, then SGD on the scorer that weighs them.

    score_cz = sum_i log p([y_i = c] | x_i, z; w)              over the client's examples; w: the scorer
    q_c(z)   = p(z | eta) exp(score_cz / temper) / Z_c         over all bodies z;   temper = 1 + pull
    w by SGD on  (1/N_s) sum_c E_{q_c}[score_cz]

q maximises  sum_c E_q[score_cz] - temper KL(q_c || p(. | eta)).  One KL is that of the evidence bound; `pull` more hold
clients together, for at the server's optimum sum_s KL(q_s || p) is how far their rule distributions are spread around
the generator's. EM raises, over eta and the w_s,

    sum_s sum_c temper log sum_z p(z | eta) exp(score_scz / temper) + temper log_hyper(eta)

which for pull = 0 is the evidence of one rule for each client and class: many examples then leave one rule each.

    code     shape
    score    (classes, bodies), in nats
    q        (classes, bodies), rows with sum 1; phi's entry `rule`

Xing, Lu, Yu 2024, arXiv:2308.15324 (FedNSL). In the paper, by its abstract and summaries [V]: scorers that are the
clients' own, variational EM, a KL between posterior and prior, and a second KL constraint against differences between
clients' rule distributions. Unknown to us [?]: how both enter its losses, and how it searches rules. Ours: all rules
are enumerated, so that q is exact, and both constraints are one KL with a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Epochs, ascend, detached, leaves
from fedprior.objective import Objective

_CHUNK = 100


@dataclass(frozen=True)
class Rules(Epochs):
    """Enumeration, then SGD.

    Attributes:
        pull: weight of the second KL; >= 0.
    """

    pull: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pull < math.inf:
            raise ValueError(f"pull must be finite and >= 0, got {self.pull}")

    def start(self, prior: Any, eta: Eta) -> posteriors.Point:
        """The generator's distribution of rules, and the scorer."""
        phi = prior.point(eta)
        if "rule" not in phi:
            raise TypeError(
                "inference.Rules needs a model of rules, and this one has none: use fedprior.models.rules(...), "
                "or inference.Point(lr=...)."
            )
        return posteriors.Point(phi)

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Point, Params | None]:
        """q as phi's `rule`, and the scorer; no personal state but what the prior keeps."""
        phi, trained = leaves(objective, self.start(prior, eta).phi)
        rules: Any = objective.model
        objective.train()
        with objective.holding(phi):
            with torch.no_grad():
                parts = zip(client.train.x.split(_CHUNK), client.train.y.split(_CHUNK), strict=True)
                score = sum(rules.log_lik(x, y).sum(0) for x, y in parts)
                q = (phi["rule"].log() + score / (1 + self.pull)).softmax(1)

            def bound(x: Tensor, y: Tensor) -> Tensor:
                return (q * rules.log_lik(x, y).mean(0)).sum()

            optimizers = [torch.optim.SGD(trained, self.lr)]
            ascend(bound, client.train, optimizers, self.epochs, self.batch_size, rng)
        return posteriors.Point(detached(phi) | {"rule": q}), state
