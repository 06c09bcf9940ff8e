r"""FedDyn: a Gaussian pull to the server's weights, and a multiplier for each client that undoes its bias.

    l_s(phi)    mean loss of client s;    augmented Lagrangian, per client, of  min sum_s l_s(phi_s)  with  phi_s = w:
                l_s(phi_s) - <g_s, phi_s - w> + (alpha/2) |phi_s - w|^2

    E-step      SGD on it over phi, from w;   g_s' = g_s - alpha (phi - w): grad l_s(phi) if SGD has converged
    T           (phi, g_s' - g_s, 1 if new)
    M-step      minimise over w:   w = mean phi - h / alpha,    h = mean g_s over the clients seen so far

At a fixed point phi_s = w for all s, hence h = 0 and g_s = grad l_s(w): the optimum of all clients' data, whatever the
number of local steps. log_prob is minus the Lagrangian without l_s, for clients whose multipliers are g_s'.

    paper    code            shape                  paper    code       shape
    theta    eta.mean        as the parameters      -h^t     eta.dual   as the parameters
    alpha    alpha           per example            grad L   q.tilt     g_s, as the parameters

Acar et al. 2021, arXiv:2111.04263, Algorithm 1. Ours: h is the mean over the clients seen so far (priors/running.py),
the paper's is over all, of which the unseen have g = 0; with full participation both are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Params, Stats
from fedprior.priors.running import joined


@dataclass(frozen=True)
class FedDyn:
    """N(w, 1/alpha) per example, and multipliers. Its E-step is inference.Tilted.

    Attributes:
        alpha: the pull, per parameter and for a loss in nats per example; > 0.
    """

    alpha: float = 0.1
    uplink = ("phi", "step", "new")
    exact = ("dual", "seen")

    class Eta(NamedTuple):
        """The weights, the mean multiplier, and how many clients that is the mean of."""

        mean: Params
        dual: Params
        seen: Params

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a finite number > 0, got {self.alpha}; 0 is fedprior.fedavg(...)")

    def init(self, params: Params) -> Eta:
        """Multipliers of 0."""
        first = next(iter(params.values()))
        return self.Eta(params, tree.map(torch.zeros_like, params), {"clients": first.new_zeros(())})

    def stats(self, q: Any) -> Stats:
        """phi and its square, g_s and its product with phi, the change of g_s and whether that is the first."""
        terms = {"phi": q.mean(), "phi_sq": q.second_moment(), "step": q.step, "new": q.new}
        return Stats(terms | {"dual": q.tilt, "dual_phi": tree.map(torch.mul, q.tilt, q.mean())})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """<g_s, phi - w> - (alpha/2) |phi - w|^2, summed over clients."""

        def term(w: Tensor, phi: Tensor, phi_sq: Tensor, dual: Tensor, dual_phi: Tensor) -> Tensor:
            return dual_phi - w * dual - 0.5 * self.alpha * (phi_sq - 2 * w * phi + t.clients * w**2)

        return tree.total(tree.map(term, eta.mean, *(t[k] for k in ("phi", "phi_sq", "dual", "dual_phi"))))

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """The mean, moved against the mean multiplier."""
        dual, seen = joined(eta.dual, eta.seen, t)
        return self.Eta(tree.map(lambda phi, h: phi / t.clients - h / self.alpha, t["phi"], dual), dual, seen)

    def point(self, eta: Eta) -> Params:
        """The weights."""
        return eta.mean

    def tilt(self, eta: Eta, own: Params | None) -> Params:
        """g_s."""
        return own or tree.map(torch.zeros_like, eta.dual)

    def own(self, eta: Eta, own: Params | None, phi: Params, path: float) -> Params:
        """g_s'."""
        return tree.map(lambda g, w, phi: g - self.alpha * (phi - w), self.tilt(eta, own), eta.mean, phi)
