r"""Clients scatter around the server's weights, and how far is learned for each weight.

    phi_s ~ N(m, diag v);   T = (phi, phi^2);   M-step   m = E[phi],  v = E[phi^2] - m^2       E: mean over clients

Where clients agree the pull 1/v is strong, where they differ it lets them. With a point posterior v only holds the
scatter of the points: hard EM makes it smaller every round, and `floor` is what keeps the pull finite.

    paper    code        shape                    paper    code       shape
    m        eta.mean    as the parameters        v        eta.var    as the parameters

The empirical-Bayes estimate of a normal hierarchy: Gelman et al., Bayesian Data Analysis (3rd ed.), chapter 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Params, Stats


@dataclass(frozen=True)
class LearnedScale:
    """N(m, diag v), both learned.

    Attributes:
        floor: the smallest v, in squared parameter units; > 0. An E-step by SGD needs lr / (floor N_s) < 2.
        first: v before round one.
    """

    floor: float = 1e-2
    first: float = 1.0
    uplink = ("phi", "phi_sq")
    exact = ("var",)

    class Eta(NamedTuple):
        """The mean and the variance of the clients' parameters."""

        mean: Params
        var: Params

    def __post_init__(self) -> None:
        if not (0 < self.floor < math.inf and self.floor <= self.first < math.inf):
            raise ValueError(f"need 0 < floor <= first, both finite, got floor={self.floor}, first={self.first}")

    def init(self, params: Params) -> Eta:
        """The initial parameters, and `first`."""
        return self.Eta(params, tree.map(lambda v: torch.full_like(v, self.first), params))

    def stats(self, q: Any) -> Stats:
        """phi and E[phi^2]."""
        return Stats({"phi": q.mean(), "phi_sq": q.second_moment()})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """-1/2 E (phi - m)^2 / v - 1/2 log v, summed over clients."""

        def terms(m: Tensor, v: Tensor, phi: Tensor, phi_sq: Tensor) -> Tensor:
            return (phi_sq - 2 * m * phi + t.clients * m**2) / v + t.clients * v.log()

        return -0.5 * tree.total(tree.map(terms, eta.mean, eta.var, t["phi"], t["phi_sq"]))

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Mean and variance over clients."""
        mean = tree.map(lambda s: s / t.clients, t["phi"])
        var = tree.map(lambda s, m: (s / t.clients - m**2).clamp(min=self.floor), t["phi_sq"], mean)
        return self.Eta(mean, var)

    def point(self, eta: Eta) -> Params:
        """The mean."""
        return eta.mean
