r"""Laplace and horseshoe: clients differ from the server in few coordinates, and in those freely.

    phi_s | w, tau ~ N(w, tau^2) entry by entry, with an auxiliary tau_sj of its own and d = phi_sj - w_j:

    laplace     tau^2 ~ Exp(mean 2 b^2), so that p(phi | w) = exp(-|d| / b) / 2b
                c = E[1/tau^2 | phi] = 1 / (b |d|)
    horseshoe   tau = b lambda, lambda ~ C+(0, 1);  mean field over lambda and Makalic and Schmidt's auxiliary nu:
                lambda^2 | nu ~ IG(1/2, 1/nu), nu ~ IG(1/2, 1);  k = E[1/lambda^2] = 1 / (E[1/nu] + u),
                E[1/nu] = 1 / (1 + k),  u = d^2 / 2b^2;   hence  u k^2 + u k - 1 = 0,  c = k / b^2

    log_prob    -1/2 c (phi - w)^2 given c;   T = (c, c phi, c phi^2)
    M-step      w = sum_s c_s phi_s / sum_s c_s
    bounds      c <= r / (b smooth), c |d| <= r / b    r = 1, or 2^(1/2) for horseshoe: (1 + 4/u)^(1/2) - 1 <= 2/u^(1/2)

c depends on the w that the client was sent: one step of iterative reweighting. Its fixed point is, for laplace, the
clients' median; as plain sums it needs no values of single clients. d^2 is d^2 + smooth^2, so that c is finite.
By Fisher's identity the slope of log_prob at the current c is that of log p(phi | w) (of its bound, for horseshoe).

    paper     code            shape
    1/tau^2   q.confidence    as the parameters
    w         eta.mean        as the parameters

Andrews, Mallows 1974 (scale mixtures); Carvalho, Polson, Scott 2010, doi:10.1093/biomet/asq017 (horseshoe);
Makalic, Schmidt 2016, arXiv:1508.03884. As priors of a federation: ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Params, Stats


@dataclass(frozen=True)
class ScaleMixture:
    """Heavy tails around w. Its E-step is inference.Reweighted.

    Attributes:
        kind: "laplace" or "horseshoe".
        scale: b, in parameter units; > 0.
        smooth: differences below this are all the same, in parameter units; > 0. The largest precision is about
            1 / (scale smooth), and an E-step by SGD needs lr / (scale smooth N_s) < 2.
    """

    kind: Literal["laplace", "horseshoe"] = "laplace"
    scale: float = 0.5
    smooth: float = 1e-2
    uplink = ("conf", "conf_phi")
    precise = uplink

    class Eta(NamedTuple):
        """The centre of the clients' parameters."""

        mean: Params

    def __post_init__(self) -> None:
        if self.kind not in ("laplace", "horseshoe"):
            raise ValueError(f'kind must be "laplace" or "horseshoe", got {self.kind!r}')
        if not (0 < self.scale < math.inf and 0 < self.smooth < math.inf):
            raise ValueError(f"need finite scale > 0 and smooth > 0, got scale={self.scale}, smooth={self.smooth}")

    def init(self, params: Params) -> Eta:
        """The initial parameters."""
        return self.Eta(params)

    def stats(self, q: Any) -> Stats:
        """c, c phi, c phi^2."""
        first = tree.map(torch.mul, q.confidence, q.phi)
        return Stats({"conf": q.confidence, "conf_phi": first, "conf_phi_sq": tree.map(torch.mul, first, q.phi)})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """-1/2 c (phi - w)^2, summed over clients."""

        def square(w: Tensor, conf: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return second - 2 * w * first + w**2 * conf

        return -0.5 * tree.total(tree.map(square, eta.mean, t["conf"], t["conf_phi"], t["conf_phi_sq"]))

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """The mean, weighted by confidence."""
        return self.Eta(tree.map(torch.div, t["conf_phi"], t["conf"]))

    def point(self, eta: Eta) -> Params:
        """The centre."""
        return eta.mean

    def reference(self, eta: Eta, sent: Stats) -> Stats:
        """c w: the differences c (phi - w) are bounded, and a c that was rounded still stands for weights near w."""
        return Stats({"conf_phi": tree.map(torch.mul, sent["conf"], eta.mean)}, sent.clients)

    @property
    def bounds(self) -> dict[str, float]:
        """The last line of the module's formulas, and a thousandth for rounding."""
        most = 1.001 * (1.0 if self.kind == "laplace" else math.sqrt(2)) / self.scale
        return {"conf": most / self.smooth, "conf_phi": most}

    def confidence(self, eta: Eta, phi: Params) -> Params:
        """c = E[1/tau^2 | phi, w]; no gradient goes through it."""

        def expected(w: Tensor, phi: Tensor) -> Tensor:
            square = (phi.detach() - w) ** 2 + self.smooth**2
            if self.kind == "laplace":
                return 1 / (self.scale * square.sqrt())
            u = square / (2 * self.scale**2)
            return ((1 + 4 / u).sqrt() - 1) / (2 * self.scale**2)

        return tree.map(expected, eta.mean, phi)
