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
    r_k        eta.part{k}_mean    as the parameters                     c       t["pi"]["pi"]     (K,)
    sigma^2    1 / precision       scalar

Kim, Hospedales 2023, arXiv:2305.04979 (mixture; ridge = 1): derived here from the model, without the paper's code
(there is none). Ours: the weighting of the centres by their clients in place of the paper's gating network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedprior.core import Eta, Stats
from fedprior.priors.components import seen
from fedprior.priors.gaussian import Gaussian
from fedprior.priors.mixture import Mixture
from fedprior.priors.parts import join_etas, part_etas


@dataclass(frozen=True)
class Centres(Mixture):
    """K Gaussians of equal shares and precision, under a Gaussian.

    Attributes:
        components: K, >= 1.
        prior: of a client around its centre, with a precision > 0.
        ridge: precision of the centres around 0, per parameter; >= 0.
        clients: how many there are, if not all take part in every round: sums are scaled up to them; None for those
            that took part.
    """

    components: int = 2
    prior: Gaussian = field(default_factory=lambda: Gaussian(10.0))
    ridge: float = 1.0
    clients: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.prior.precision > 0 and 0 <= self.ridge < math.inf and 0 < (self.clients or 1) < math.inf):
            raise ValueError(f"need precision > 0, a finite ridge >= 0 and clients > 0 (or None), got {self}")

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """Of the centres; equal shares are a constant."""
        return self.scatter(eta, t)

    def log_hyper(self, eta: Eta, before: Eta) -> Tensor:
        """Of the centres around 0."""
        shrunk = [w.square().sum() for r in self.points(eta) for k, w in r.items() if self._shrinks(k)]
        return -0.5 * self.ridge * torch.stack(shrunk).sum()

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Shrunk means by responsibility."""
        t = t if self.clients is None else t.weighted(self.clients / t.clients)
        pi, means = t["pi"]["pi"], part_etas(super().m_step(eta, t))

        def shrunk(mean: Gaussian.Eta, c: float) -> Gaussian.Eta:
            left = c / (c + self.ridge / self.prior.precision) if seen(c, t) else 1.0
            return Gaussian.Eta({k: left * w if self._shrinks(k) else w for k, w in mean.mean.items()})

        return join_etas([shrunk(*one) for one in zip(means, pi.tolist(), strict=True)], share={"pi": pi / t.clients})

    def _shrinks(self, name: str) -> bool:
        return self.names is None or name in self.names
