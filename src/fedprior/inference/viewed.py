"""A prior as one client's E-step sees it: with what only this client knows, and in the units of its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedprior.core import Eta, Params, Stats


@dataclass(frozen=True)
class Viewed:
    """What inference.Point asks of a prior, over the posteriors that `posterior` makes of a point.

    Attributes:
        prior: the prior itself.
        posterior: phi -> the q whose statistics count.
        copies: how often they count; N_s for a prior whose units are nats per example.
    """

    prior: Any
    posterior: Callable[[Params], Any]
    copies: float = 1.0

    def point(self, eta: Eta) -> Params:
        """The prior's."""
        return self.prior.point(eta)

    def stats(self, q: Any) -> Stats:
        """Those of the posterior that phi makes, `copies` times."""
        return self.prior.stats(self.posterior(q.phi)).weighted(self.copies)

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """The prior's."""
        return self.prior.log_prob(eta, t)
