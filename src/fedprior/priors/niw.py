r"""FedHB-NIW: mean and variance of the clients' parameters are uncertain themselves, under their conjugate prior.

Each coordinate by itself (a diagonal covariance), for client s of N:

    v ~ IG(dof/2, scale/2),  mu | v ~ N(0, v/kappa),  phi_s | mu, v ~ N(mu, v);     NIW(0, scale, kappa, dof), d = 1
    q(mu, v) = NIW(m, V, l, n)      l = kappa + N,   n = dof + N      so that  E[1/v] = n / V
    q(phi_s) = N(phi_s, spread^2)

    log_prob   E_q log N(phi_s; mu, v) = -1/2 [ n E(phi_s - m)^2 / V + 1/l + log(V/2) - digamma(n/2) ] + const
    log_hyper  -KL(q(mu, v) || NIW(0, scale, kappa, dof))
    M-step     m = sum_s phi_s / (kappa + N),   V = scale + kappa m^2 + sum_s E(phi_s - m)^2

The M-step is the conjugate posterior, which maximises sum_s log_prob + log_hyper over m, V and N. In the E-step a
client is pulled to m with precision n / V.

    paper    code           shape                   paper    code             shape
    m_0      eta.mean       as the parameters       V_0      eta.scale        as the parameters
    l_0 - 1  eta.seen      scalar, in a dict: N    epsilon  spread           scalar

Kim, Hospedales 2023, arXiv:2305.04979: derived here from the model, without the paper's code (there is
none). Ours: coordinates of their own, hence dof = 3 = d + 2 with d = 1; for a covariance of all d parameters the paper
takes dof = d + 2, whose pull n / V is d times as strong. Point posteriors with a fixed spread; no dropout spikes.
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
class NIW:
    """A Gaussian under a normal-inverse-Wishart, coordinate by coordinate.

    Attributes:
        scale: of the hyper-prior, in squared parameter units; > 0.
        kappa: how many clients at 0 the hyper-prior is worth; > 0.
        dof: its degrees of freedom; > 0.
        spread: standard deviation of a client's posterior, in parameter units; >= 0.
        clients: how many there are, if not all take part in every round: sums are scaled up to them; None for those
            that took part.
    """

    scale: float = 1.0
    kappa: float = 1.0
    dof: float = 3.0
    spread: float = 1e-2
    clients: float | None = None
    uplink = ("phi", "phi_sq")
    exact = ("scale", "seen")

    class Eta(NamedTuple):
        """q(mu, v): its mean, its scale, and the number of clients that it has seen."""

        mean: Params
        scale: Params
        seen: Params

    def __post_init__(self) -> None:
        if not all(0 < v < math.inf for v in (self.scale, self.kappa, self.dof, self.clients or 1)) or self.spread < 0:
            raise ValueError(f"need scale, kappa, dof, clients > 0 (clients may be None) and spread >= 0, got {self}")

    def init(self, params: Params) -> Eta:
        """The hyper-prior, but for its mean: the model's initial parameters."""
        first = next(iter(params.values()))
        return self.Eta(
            params, tree.map(lambda v: torch.full_like(v, self.scale), params), {"clients": first.new_zeros(())}
        )

    def stats(self, q: Any) -> Stats:
        """phi and E[phi^2]."""
        return Stats({"phi": q.mean(), "phi_sq": tree.map(lambda s: s + self.spread**2, q.second_moment())})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """E_q log N(phi_s; mu, v), summed over clients."""
        count = eta.seen["clients"]
        level, n = 1 / (self.kappa + count), self.dof + count

        def terms(m: Tensor, v: Tensor, phi: Tensor, phi_sq: Tensor) -> Tensor:
            square = phi_sq - 2 * m * phi + t.clients * m**2
            return n * square / v + t.clients * (level + (v / 2).log() - torch.digamma(n / 2))

        return -0.5 * tree.total(tree.map(terms, eta.mean, eta.scale, t["phi"], t["phi_sq"]))

    def log_hyper(self, eta: Eta, before: Eta) -> Tensor:
        """-KL(q(mu, v) || hyper-prior)."""
        count = eta.seen["clients"]
        level, a, a0, b0 = self.kappa / (self.kappa + count), (self.dof + count) / 2, self.dof / 2, self.scale / 2
        shape = (a - a0) * torch.digamma(a) - torch.lgamma(a) + math.lgamma(a0)

        def divergence(m: Tensor, v: Tensor) -> Tensor:
            b = v / 2
            mean = 0.5 * (level - level.log() - 1 + self.kappa * m**2 * a / b)
            return mean + shape + a0 * (b / b0).log() + a * (b0 - b) / b

        return -tree.total(tree.map(divergence, eta.mean, eta.scale))

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """The conjugate posterior."""
        t = t if self.clients is None else t.weighted(self.clients / t.clients)
        mean = tree.map(lambda phi: phi / (self.kappa + t.clients), t["phi"])
        scale = tree.map(lambda m, s: self.scale + s - (self.kappa + t.clients) * m**2, mean, t["phi_sq"])
        floored = tree.map(lambda v: v.clamp(min=self.scale), scale)
        return self.Eta(mean, floored, tree.map(lambda n: torch.full_like(n, t.clients), eta.seen))

    def point(self, eta: Eta) -> Params:
        """The mean."""
        return eta.mean
