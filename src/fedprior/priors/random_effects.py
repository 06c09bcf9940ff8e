r"""FedPop: every client draws parameters of its own from a population, whose mean and width are learned.

    theta_s ~ N(mu, sigma^2 I)     d entries; the client samples its posterior (inference/chain.py)

    T        = (theta, |theta|^2 / d)
    log_prob = -(d/2) [ E|theta - mu|^2 / (d sigma^2) + log sigma^2 ]
    M-step   mu = E[theta],   square = E|theta|^2 / d,   sigma^2 = square - |mu|^2 / d        E: mean over clients

eta holds (mu, square), the means of the statistics themselves. A damped step (server.Damped) is therefore an average
of statistics: stochastic-approximation EM with a constant rate, and the M-step of the average is read off `variance`.

    paper           code                  shape                    paper    code                   shape
    mu of beta      eta.mean              as the parameters        d        tree.size(eta.mean)    number of entries
    sigma of beta   variance(eta)**0.5    scalar

Kotelevskii, Vono, Durmus, Moulines 2022, arXiv:2206.03611 (FedPop): the population model, for any p(theta | beta), and
SAEM; the text's equation numbers are not known to us. Their code has a Gaussian, a mixture of Gaussians and an energy
model, all learned by gradient, and for its image tasks holds mu at 0 and sigma fixed. Ours: one learned sigma, and the
M-step in closed form. Delyon, Lavielle, Moulines 1999, doi:10.1214/aos/1018031103 (SAEM).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fedprior import tree
from fedprior.core import Params, Stats


@dataclass(frozen=True)
class RandomEffects:
    """N(mu, sigma^2 I), both learned; a part of a Split, as a rule.

    Attributes:
        sigma: before round one, in parameter units; > 0.
        floor: the smallest sigma^2; > 0. An E-step by SGD needs lr / (floor N_s) < 2.
    """

    sigma: float = 0.1
    floor: float = 1e-3
    uplink = ("phi", "square")

    class Eta(NamedTuple):
        """The clients' mean, and {"square": the mean of an entry's square}."""

        mean: Params
        square: Params

    def __post_init__(self) -> None:
        if not (0 < self.floor < math.inf and self.floor <= self.sigma**2 < math.inf):
            raise ValueError(f"need 0 < floor <= sigma^2, both finite, got floor={self.floor}, sigma={self.sigma}")

    def init(self, params: Params) -> Eta:
        """The initial parameters, and `sigma`."""
        return self.Eta(params, {"square": _mean_square(params) + self.sigma**2})

    def stats(self, q: Any) -> Stats:
        """theta, and its mean square."""
        square = tree.total(q.second_moment()) / tree.size(q.mean())
        return Stats({"phi": q.mean(), "square": {"square": square}})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """Summed over entries and clients."""
        d, var = tree.size(eta.mean), self.variance(eta)
        apart = t["square"]["square"] - 2 * tree.dot(eta.mean, t["phi"]) / d + t.clients * _mean_square(eta.mean)
        return -0.5 * d * (apart / var + t.clients * var.log())

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Means over clients."""
        return self.Eta(*(tree.map(lambda s: s / t.clients, t[term]) for term in self.uplink))

    def point(self, eta: Eta) -> Params:
        """mu."""
        return eta.mean

    def effects(self, phi: Params) -> Params:
        """What is a client's own, and sampled: all of it (inference.Chain)."""
        return phi

    def variance(self, eta: Eta) -> Tensor:
        """sigma^2."""
        return (eta.square["square"] - _mean_square(eta.mean)).clamp(min=self.floor)


def _mean_square(params: Params) -> Tensor:
    """|params|^2 / d."""
    return tree.dot(params, params) / tree.size(params)
