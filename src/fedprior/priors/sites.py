r"""PVI and FedEP: one Gaussian over shared weights, in which every client has a factor.

    q(theta) = p(theta) prod_s t_s(theta),    t_s(theta) ~ exp(shift_s theta - precision_s theta^2 / 2) for each entry
    p(theta) = N(theta_0, 1/precision),       theta_0 the model's initial parameters
    T        the change of t_s: natural parameters;     M-step   natural parameters of q += sum_s changes

    log_prob   E_q[ sum_s log (change of t_s) ]         as a function of eta, the natural parameters of q
    log_hyper  -KL(q || q before)                       whose sum the M-step maximises: q ~ q_before prod_s change_s

The latent is shared, so that nothing is between theta and the clients: the M-step adds. All else is in
inference.Sites. Weights must be uniform: a factor counts once.

    paper        code               shape                   paper        code          shape
    Lambda       eta.precision      as the parameters       Lambda m     eta.shift     as the parameters

Bui et al. 2018, arXiv:1811.11206 (PVI); Guo et al. 2023, arXiv:2302.04228 (FedEP), recalled, not compared line by line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Params, Stats


@dataclass(frozen=True)
class Sites:
    """A diagonal Gaussian in natural parameters.

    Attributes:
        precision: of p(theta), per parameter and for sums over all clients' data; > 0.
    """

    precision: float = 100.0
    uplink = ("precision", "shift")
    exact = ("precision", "shift")
    bounds = MappingProxyType({"precision": 1e4, "shift": 1e4})  # sums over a client's examples

    class Eta(NamedTuple):
        """Precision, and precision times mean."""

        precision: Params
        shift: Params

    def __post_init__(self) -> None:
        if not 0 < self.precision < math.inf:
            raise ValueError(f"precision must be a finite number > 0, got {self.precision}")

    def init(self, params: Params) -> Eta:
        """p(theta), around the initial parameters."""
        return self.Eta(
            tree.map(lambda v: torch.full_like(v, self.precision), params),
            tree.map(lambda v: self.precision * v, params),
        )

    def stats(self, q: Any) -> Stats:
        """The change of the client's factor."""
        return Stats({"precision": q.precision, "shift": q.shift})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """E_q[shift theta - precision theta^2 / 2], summed over clients."""

        def expected(own: Tensor, own_shift: Tensor, precision: Tensor, shift: Tensor) -> Tensor:
            m = own_shift / own
            return shift * m - 0.5 * precision * (m**2 + 1 / own)

        return tree.total(tree.map(expected, eta.precision, eta.shift, t["precision"], t["shift"]))

    def log_hyper(self, eta: Eta, before: Eta) -> Tensor:
        """-KL(q || q before)."""

        def divergence(a: Tensor, a_shift: Tensor, b: Tensor, b_shift: Tensor) -> Tensor:
            return 0.5 * ((a / b).log() + b / a - 1 + b * (a_shift / a - b_shift / b) ** 2)

        return -tree.total(tree.map(divergence, eta.precision, eta.shift, before.precision, before.shift))

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Natural parameters add."""
        return self.Eta(tree.map(torch.add, eta.precision, t["precision"]), tree.map(torch.add, eta.shift, t["shift"]))

    def point(self, eta: Eta) -> Params:
        """The mean."""
        return tree.map(torch.div, eta.shift, eta.precision)
