r"""Gaussian prior: clients scatter around the server's weights. With a point posterior this is FedAvg/FedProx.

    phi_s ~ N(w, (1/precision) I)

    log p(phi | w) = -(precision/2) |phi - w|^2 + const
    T = (phi, phi^2);   M-step   w = sum_s phi_s / sum_s 1

    paper    code            shape
    w        eta.mean        as the parameters
    lambda   precision       scalar; 0 is the flat limit: no pull on the client, and the M-step is still the mean

Louizos et al. 2021, arXiv:2111.10192, section 2 (FedAvg as hard EM); McMahan et al. 2017, arXiv:1602.05629;
FedProx's mu is `precision` / N_s for a mean loss: Li et al. 2020, arXiv:1812.06127, eq. (2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Params, Stats


@dataclass(frozen=True)
class Gaussian:
    """N(w, 1/precision) over every parameter.

    Attributes:
        precision: lambda, per parameter and per client's data set (sum of log-likelihoods); >= 0.
    """

    precision: float = 0.0
    uplink = ("phi",)

    class Eta(NamedTuple):
        """The mean of the clients' parameters."""

        mean: Params

    def __post_init__(self) -> None:
        if not 0 <= self.precision < float("inf"):
            raise ValueError(f"precision must be a finite number >= 0, got {self.precision}")

    def init(self, params: Params) -> Eta:
        """Start at the model's initial parameters."""
        return self.Eta(params)

    def stats(self, q: Any) -> Stats:
        """phi and, unless the prior is flat, its second moment."""
        return Stats({"phi": q.mean()} | ({"phi_sq": q.second_moment()} if self.precision else {}))

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """-(precision/2) E|phi - w|^2 summed over clients."""
        if self.precision == 0:
            return torch.zeros(())

        def square(w: Tensor, phi: Tensor, phi_sq: Tensor) -> Tensor:
            return phi_sq - 2 * w * phi + t.clients * w**2

        return -0.5 * self.precision * tree.total(tree.map(square, eta.mean, t["phi"], t["phi_sq"]))

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """The mean over clients."""
        return self.Eta(tree.map(lambda phi: phi / t.clients, t["phi"]))

    def point(self, eta: Eta) -> Params:
        """The mean."""
        return eta.mean
