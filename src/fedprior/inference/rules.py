r"""The E-step of rules: the exact posterior over a client's rules, then SGD on the scorer that weighs them.

    score_cz = sum_i log p([y_i = c] | x_i, z; w)            over the client's examples, w the scorer
    q_c(z)   = p(z | eta) exp(score_cz / temper) / Z_c       over all bodies z
    w by SGD on  (1/N_s) sum_c E_{q_c}[score_cz]

q maximises  sum_c E_q[score_cz] - temper KL(q_c || p(. | eta)),  temper = 1 + pull. One KL is the evidence bound's. `pull`
more hold the clients together: at the server's optimum sum_s KL(q_s || p) is the spread of the clients' rule
distributions around the generator. What EM raises, with w and eta, is

    sum_s sum_c temper log sum_z p(z | eta) exp(score_scz / temper) + log_hyper(eta)

With pull = 0 that is the evidence of one rule for each client and class; many examples then leave one rule each.

Xing, Lu, Yu 2024, arXiv:2308.15324 (FedNSL): a scorer at each client, a KL between posterior and prior and a second one
against differences between clients' rules [R]; how these enter its losses is unknown to us [?]. Ours: enumeration of all
rules in place of a search, and both constraints as one KL with a weight.
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
        return posteriors.Point(prior.point(eta))

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Point, Params | None]:
        """q as phi's `rule`, and the scorer; no personal state but what the prior keeps."""
        phi, trained = leaves(objective, prior.point(eta))
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
