r"""FedHB's mixture: every client's parameters lie around one of K centres, which are uncertain themselves.

    r_k ~ N(0, (1/ridge) I),   z_s uniform,   phi_s | z_s = k ~ N(r_k, (1/precision) I)

    log p = -(precision/2) sum_k c_k |phi - r_k|^2 + const          c_k = q(z = k), the client's responsibilities
    log_hyper = -(ridge/2) sum_k |r_k|^2

    T = (c_k phi, c_k phi^2, c_k)
    M-step   r_k = sum_s c_sk phi_s / (ridge/precision + sum_s c_sk),      share_k = sum_s c_sk / sum_s 1

The hyper-prior counts as ridge/precision clients at 0. Running moments are not shrunk. A centre without clients keeps
its r_k, where the line above says 0: a network of zeros cannot learn. The shares are no part of the model, whose own
are 1/K; they say which centre `point` takes, and how `predictive` weighs them.

    paper      code                shape                                 paper   code              shape
    r          eta.mean            (K, ...) for a parameter's (...)      c       t["pi"]["pi"]     (K,)
    sigma^2    1 / precision       scalar

Kim, Hospedales 2023, arXiv:2305.04979 (mixture; ridge = 1): derived here from the model, without the paper's code
(there is none). Ours: the weighting of the centres by their clients in place of the paper's gating network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Stats
from fedprior.priors.mixture import Mixture, along


@dataclass(frozen=True)
class Centres(Mixture):
    """K Gaussians of equal shares and precision, under a Gaussian.

    Attributes:
        components: K, >= 1.
        precision: per parameter and per client's data set; > 0.
        ridge: precision of the centres around 0, per parameter; >= 0.
        clients: how many there are, if not all take part in every round: sums are scaled up to them; None for those
            that took part.
    """

    components: int = 2
    precision: float = 10.0
    ridge: float = 1.0
    clients: float | None = None
    exact = ("share",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.precision > 0 and 0 <= self.ridge < math.inf and 0 < (self.clients or 1) < math.inf):
            raise ValueError(f"need precision > 0, a finite ridge >= 0 and clients > 0 (or None), got {self}")

    def log_prob(self, eta: Mixture.Eta, t: Stats) -> Tensor:
        """Of the centres; equal shares are a constant."""
        return torch.as_tensor(self.scatter(eta, t))

    def log_hyper(self, eta: Mixture.Eta, before: Mixture.Eta) -> Tensor:
        """Of the centres around 0."""
        return -0.5 * self.ridge * tree.total({k: w.square() for k, w in eta.mean.items() if self._shrinks(k)})

    def m_step(self, eta: Mixture.Eta, t: Stats) -> Mixture.Eta:
        """Shrunk means by responsibility."""
        t = t if self.clients is None else t.weighted(self.clients / t.clients)
        pi, mean = t["pi"]["pi"], super().m_step(eta, t).mean
        left = torch.where(self.seen(t), pi / (pi + self.ridge / self.precision), torch.ones_like(pi))
        shrunk = {k: along(left, w) * w if self._shrinks(k) else w for k, w in mean.items()}
        return self.Eta(shrunk, {"pi": pi / t.clients})

    def _shrinks(self, name: str) -> bool:
        return self.names is None or name in self.names
