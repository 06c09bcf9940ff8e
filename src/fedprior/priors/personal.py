"""A flat prior that is never shared: every client has parameters of its own, which it keeps.

    log p(phi) = const;   no statistic, no eta, nothing on the wire
    a client's first phi is that of the model, and each later E-step starts from what its last one left

What a client keeps lives in its state (algorithm.py); `point` is what a new client, or the server, has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedprior.core import Params, Stats
from fedprior.objective import params_of


@dataclass(frozen=True)
class Personal:
    """Parameters that stay with the client; a part of a Split, as a rule.

    Attributes:
        values: those of the client that looks at the prior, or of the model; None until `bind`.
    """

    values: Params | None = field(default=None, repr=False, compare=False)
    uplink = ()

    class Eta(NamedTuple):
        """Nothing is shared."""

    def bind(self, model: nn.Module, x: Tensor) -> Personal:
        """Start from the model's parameters."""
        return replace(self, values=params_of(model))

    def recall(self, kept: Params) -> Personal:
        """As the client with these parameters sees it."""
        return replace(self, values=kept)

    def init(self, params: Params) -> Eta:
        """Nothing."""
        return self.Eta()

    def stats(self, q: Any) -> Stats:
        """None but the count."""
        return Stats({})

    def kept(self, q: Any) -> Params:
        """All of the client's parameters."""
        return q.mean()

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """Flat."""
        return torch.zeros(())

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Nothing to learn."""
        return eta

    def point(self, eta: Eta) -> Params:
        """The client's own values; the model's, for a new client."""
        if self.values is None:
            raise ValueError("Personal has no values yet: call bind(model, x), as fedprior.run does")
        return self.values
