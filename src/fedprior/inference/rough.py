r"""Hard EM under rough weights: the gradient is taken where the weights are rounded, or shaken as if they were.

    APQN   maximise over phi  E_u log p(D | phi + step_b u) + log p(phi | eta)     u ~ U[-1/2, 1/2], entry by entry
    MQAT   maximise over phi  E_b log p(D | rounded_b(phi)) + log p(phi | eta)     b drawn from `bits`, every mini-batch

step_b and rounded_b are those of rounding.py; one draw a mini-batch. APQN is the variational E-step for q = phi +
uniform noise of a fixed width, MQAT averages over the nuisance b; the slope passes through the rounding as if it were
not there (straight-through), and step_b counts as a constant. The server averages the unrounded phi.

Gupta et al. 2023, arXiv:2206.10844, name both objectives; that b is drawn for each mini-batch is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fedprior import posteriors
from fedprior.core import Client, Eta, Params, Prior
from fedprior.inference.ascent import Descent, Epochs, ascend, detached, leaves
from fedprior.objective import Objective
from fedprior.penalties import matrices
from fedprior.rounding import rounded, step_of

Kind = Literal["noise", "rounding"]


@dataclass(frozen=True)
class Rough(Epochs):
    """SGD at rough weights.

    Attributes:
        kind: "noise" (APQN) or "rounding" (MQAT).
        bits: the numbers of bits to draw from.
    """

    kind: Kind = "noise"
    bits: tuple[int, ...] = (4,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in get_args(Kind) or not self.bits or not all(1 <= b <= 16 for b in self.bits):
            raise ValueError(f"Rough needs kind 'noise' or 'rounding', and bits of 1 to 16, got {self}")

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        """The prior's point."""
        return posteriors.Point(prior.point(eta))

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Point, Params | None]:
        """A few epochs from the prior's point; no personal state."""
        phi, trained = leaves(objective, prior.point(eta))
        q = posteriors.Point(phi)

        def bound(x: Tensor, y: Tensor) -> Tensor:
            pull = prior.log_prob(eta, prior.stats(q)) / len(client.train)
            return objective.log_lik(self.rough(objective, phi, rng), x, y) + pull

        objective.train()
        smallest, optimizers = objective.smallest_batch, [Descent(trained, self.lr)]
        ascend(bound, client.train, optimizers, self.epochs, self.batch_size, rng, smallest=smallest)
        return posteriors.Point(detached(phi)), state

    def rough(self, objective: Objective, phi: Params, rng: torch.Generator) -> Params:
        """phi plus a constant that makes it rough."""
        bits = self.bits[int(torch.randint(len(self.bits), (), generator=rng))]
        frozen = detached(phi)
        if self.kind == "rounding":
            target = rounded(objective, frozen, bits)
            return phi | {k: phi[k] + (target[k] - frozen[k]) for k in matrices(objective, frozen)}

        def noise(value: Tensor) -> Tensor:
            u = torch.rand(value.shape, generator=rng, dtype=value.dtype).to(value.device) - 0.5
            return step_of(value, bits) * u

        return phi | {k: phi[k] + noise(v) for k, v in matrices(objective, frozen).items()}
