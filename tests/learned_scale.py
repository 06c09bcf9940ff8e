"""A third party's prior, as the guide on adding a prior prints it: nothing in the library knows of it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fedprior import Params, Stats, tree


@dataclass(frozen=True)
class LearnedScale:
    """phi_s | eta ~ N(m, diag v), m and v learned: m = E[phi], v = E[phi^2] - m^2 over clients."""

    floor: float = 1e-4  # smallest v, in squared parameter units
    uplink = ("phi", "phi_sq")  # the terms that m_step reads, hence the ones sent

    class Eta(NamedTuple):
        mean: Params
        var: Params

    def init(self, params):
        return self.Eta(params, tree.map(torch.ones_like, params))

    def stats(self, q):
        return Stats({"phi": q.mean(), "phi_sq": q.second_moment()})

    def log_prob(self, eta, t):
        def terms(m, v, phi, phi_sq):
            return (phi_sq - 2 * m * phi + t.clients * m**2) / v + t.clients * v.log()

        return -0.5 * tree.total(tree.map(terms, eta.mean, eta.var, t["phi"], t["phi_sq"]))

    def m_step(self, eta, t):
        mean = tree.map(lambda s: s / t.clients, t["phi"])
        var = tree.map(lambda s, m: (s / t.clients - m**2).clamp(min=self.floor), t["phi_sq"], mean)
        return self.Eta(mean, var)

    def point(self, eta):
        return eta.mean
