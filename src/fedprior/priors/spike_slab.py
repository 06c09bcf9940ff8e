r"""Spike and slab: clients share which units are alive (FedSparse).

    z_sg ~ Bernoulli(theta_g)                            one gate per unit g (a filter, a neuron)
    phi_sj | z_sg = 1 ~ N(w_j, 1/precision),  phi_sj | z_sg = 0 ~ N(0, 1/spike_precision)    for each j that g owns

    q(z_sg) = Bernoulli(pi_sg),  q(phi | z = 1) a point;  as its width goes to 0,
    log_prob = - sum_g pi_g [ lambda_0 |g| + (precision/2) sum_{j in g} (phi_j - w_j)^2 ]
               + sum_g [ pi_g log theta_g + (1 - pi_g) log(1 - theta_g) ]
    lambda_0 = (1/2) log(spike_precision / precision)    the price of one live parameter, in nats
    T = (pi, z, z phi, z phi^2);   M-step  theta_g = sum pi_g / S,   w_j = sum z_g phi_j / sum z_g

    paper    code        shape                          paper    code      shape
    w        eta.mean    as the parameters              pi       t.keep    group -> (units,), sums over clients
    theta    eta.keep    group -> (units,)              z        t.gate    group -> (units,); E[z] = pi, or a draw
    S        t.clients   scalar                         |g|      sizes     live parameters that the unit owns

What reads a removed unit is gone as well, and no longer counts in |g|: lambda_0 prices what is really there.
Entries that no group owns are Gaussian. Louizos et al. 2021, arXiv:2111.10192, section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedprior import gates, structure, tree
from fedprior.core import Params, Stats
from fedprior.slim import Cut, removable
from fedprior.structure import Group

_TINY = 1e-12


@dataclass(frozen=True)
class SpikeSlab:
    """A gate per unit, and weights that are shared while it is open.

    Attributes:
        lambda_0: price of a live parameter, in nats per client's data set.
        precision: pull of an open weight towards the server's; 0 is flat.
        keep: theta at the start.
        threshold: a unit with theta below it is removed for good; a group keeps its best unit, at the threshold.
        clamp: theta is at most 1 - clamp: at 1 the log-odds are infinite.
        groups: the model's units; empty until `bind` finds them.
    """

    lambda_0: float
    precision: float = 0.0
    keep: float = 0.99
    threshold: float = 0.1
    clamp: float = 1e-3
    groups: tuple[Group, ...] = ()
    uplink = ("keep", "gate", "z_phi")

    class Eta(NamedTuple):
        """Shared weights, and the probability that a unit is alive (0: removed for good)."""

        mean: Params
        keep: Params

    def __post_init__(self) -> None:
        if not (0 < self.clamp < 0.5 and self.clamp <= self.threshold < self.keep < 1):
            raise ValueError(
                "SpikeSlab needs 0 < clamp <= threshold < keep < 1 and clamp < 0.5, "
                f"got clamp={self.clamp}, threshold={self.threshold}, keep={self.keep}"
            )
        if not (0 <= self.lambda_0 < math.inf and 0 <= self.precision < math.inf):
            raise ValueError(f"need finite lambda_0 >= 0 and precision >= 0, got {self.lambda_0} and {self.precision}")

    @classmethod
    def from_precisions(cls, precision: float, spike_precision: float, **fields: Any) -> SpikeSlab:
        """The prior whose spike has this precision: lambda_0 = (1/2) log(spike_precision / precision)."""
        return cls(lambda_0=0.5 * math.log(spike_precision / precision), precision=precision, **fields)

    def bind(self, model: nn.Module, x: Tensor) -> SpikeSlab:
        """The same prior with the groups of a model."""
        return self if self.groups else replace(self, groups=removable(model, x))

    def init(self, params: Params) -> Eta:
        """All units alive with probability `keep`."""
        like = next(iter(params.values()))
        return self.Eta(params, {g.name: like.new_full((g.units,), self.keep) for g in self.groups})

    def stats(self, q: Any) -> Stats:
        """Expected gates, and weights times the gates that hold them."""
        if not hasattr(q, "gate"):
            raise TypeError(
                f"SpikeSlab needs a posterior with gates, and {type(q).__name__} has none. "
                "Use inference.Gated(lr=..., epochs=...), or the prior Gaussian if you want no gates."
            )
        z_phi = structure.close_gates(self.groups, q.gate, q.phi)
        return Stats({"keep": q.keep, "gate": q.gate, "z_phi": z_phi, "z_phi_sq": tree.map(torch.mul, z_phi, q.phi)})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """The terms of the module docstring, summed over clients."""

        def cross_entropy(theta: Tensor, keep: Tensor) -> Tensor:
            return keep * theta.clamp(min=_TINY).log() + (t.clients - keep) * (-theta).clamp(min=_TINY - 1).log1p()

        def square(w: Tensor, z: Tensor, z_phi: Tensor, z_phi_sq: Tensor) -> Tensor:
            return z_phi_sq - 2 * w * z_phi + z * w**2

        price = self.lambda_0 * tree.dot(t["gate"], structure.sizes(self.groups, eta.keep, eta.mean))
        value = tree.total(tree.map(cross_entropy, eta.keep, t["keep"])) - price
        if self.precision == 0:
            return value
        squares = tree.map(square, eta.mean, self._opened(eta, t), t["z_phi"], t["z_phi_sq"])
        return value - 0.5 * self.precision * tree.total(squares)

    def _opened(self, eta: Eta, t: Stats) -> Params:
        """sum_s z_sj of every parameter: how many clients kept it."""
        z = structure.owned(self.groups, t["gate"], eta.mean)
        return {k: z[k] if k in z else w.new_full([1] * w.ndim, t.clients) for k, w in eta.mean.items()}

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Ratio of sums; a weight that no client kept stays."""

        def mean(w: Tensor, z: Tensor, z_phi: Tensor) -> Tensor:
            return torch.where(z > 0, z_phi / z.clamp(min=_TINY), w)

        keep = tree.map(lambda keep: keep / t.clients, t["keep"])
        return self.Eta(tree.map(mean, eta.mean, self._opened(eta, t), t["z_phi"]), keep)

    def reference(self, eta: Eta, sent: Stats) -> Stats:
        """z w, with the gates that were sent: the difference z (phi - w) is zero where a gate is closed."""
        return Stats({"z_phi": tree.map(torch.mul, self._opened(eta, sent), eta.mean)}, sent.clients)

    def point(self, eta: Eta) -> Params:
        """The shared weights times the gates at test time; those of removed units are zero."""
        return structure.close_gates(self.groups, tree.map(gates.at_test_time, eta.keep), eta.mean)

    def project(self, eta: Eta, before: Eta | None = None) -> Eta:
        """Remove units below the threshold for good, with what reads them; clamp theta of the rest.

        Args:
            eta: after the server's step.
            before: the eta of the round before: what it had removed stays removed, whatever clients say.
        """

        def prune(theta: Tensor, last: Tensor) -> Tensor:
            theta = torch.where(last > 0, theta, -torch.inf)
            alive = theta >= self.threshold
            if not alive.any():
                alive[theta.argmax()] = True
            return torch.where(alive, theta.clamp(self.threshold, 1 - self.clamp), torch.zeros_like(theta))

        keep = tree.map(prune, eta.keep, eta.keep if before is None else before.keep)
        return self.Eta(structure.apply(structure.alive(self.groups, keep, eta.mean), eta.mean), keep)

    def cut(self, eta: Eta) -> Cut:
        """The units that are not removed."""
        return Cut.of(self.groups, eta.keep)
