r"""Group lasso: a Gaussian prior whose mean is drawn to zero unit by unit (a filter, a neuron).

    phi_s ~ N(w, (1/precision) I),   p(w) proportional to exp(-sum_g c_g |w_g|)      w_g: the entries that unit g owns
    T = (phi, phi^2);   M-step   v = sum_s phi_s / sum_s 1,   then the proximal step

    w_g = argmin  (1/2) |w_g - v_g|^2 + tau_g |w_g|  =  max(0, 1 - tau_g / |v_g|) v_g,   tau_g = strength sqrt(|g|)

Each round the root mean square of a unit's weights falls by `strength`, and training raises it again where the data
need the unit. A unit at 0 is removed for good, with what reads it. Entries that no unit owns are Gaussian.

    paper    code        shape                          paper    code      shape
    w        eta.mean    as the parameters              |g|      size      live parameters that the unit owns
    alive    eta.keep    group -> (units,); 1 or 0      |v_g|    norm      group -> (units,)

With S clients this is the exact M-step for c_g = precision S tau_g; the flat limit, precision 0, keeps tau_g.
Yuan & Lin 2006, doi:10.1111/j.1467-9868.2005.00532.x (group lasso); groups of a network: Wen et al. 2016,
arXiv:1608.03665; proximal steps in federated learning: Yuan, Zaheer, Reddi 2021, arXiv:2011.08474.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedprior import posteriors, structure, tree
from fedprior.core import Params, Stats
from fedprior.priors.gaussian import Gaussian
from fedprior.slim import Cut, removable
from fedprior.structure import Group


@dataclass(frozen=True)
class GroupLasso:
    """N(w, 1/precision), and block soft-thresholding of w after each M-step.

    Attributes:
        strength: how far the root mean square of a unit's weights falls a round; 0 is the Gaussian prior. PyTorch's
            initial weights have 1 / sqrt(3 inputs), 0.02 for 800: a unit that nothing trains has that to lose.
        precision: pull of a client's weights towards the server's; 0 is flat.
        groups: the model's units; empty until `bind` finds them.
    """

    strength: float
    precision: float = 0.0
    groups: tuple[Group, ...] = ()
    uplink = Gaussian.uplink

    class Eta(NamedTuple):
        """The mean of the clients' parameters, and which units are left (1, or 0: removed for good)."""

        mean: Params
        keep: Params

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength must be a finite number >= 0, got {self.strength}")
        _ = self._gaussian  # which checks the precision

    @property
    def _gaussian(self) -> Gaussian:
        return Gaussian(self.precision)

    def bind(self, model: nn.Module, x: Tensor) -> GroupLasso:
        """The same prior with the groups of a model."""
        return self if self.groups else replace(self, groups=removable(model, x))

    def init(self, params: Params) -> Eta:
        """Start at the model's initial parameters, with all units."""
        like = next(iter(params.values()))
        return self.Eta(params, {g.name: like.new_ones(g.units) for g in self.groups})

    def stats(self, q: Any) -> Stats:
        """The Gaussian's."""
        return self._gaussian.stats(q)

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """log p(phi | w), the Gaussian's; the prior of w is the server's alone."""
        return self._gaussian.log_prob(Gaussian.Eta(eta.mean), t)

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """The mean over clients, before the proximal step."""
        return eta._replace(mean=self._gaussian.m_step(Gaussian.Eta(eta.mean), t).mean)

    def point(self, eta: Eta) -> Params:
        """The mean; that of removed units is zero."""
        return eta.mean

    def project(self, eta: Eta, before: Eta | None = None) -> Eta:
        """The proximal step, and removal of units at 0; the first eta takes one as well.

        Args:
            eta: after the server's step.
            before: the eta of the round before: what it had removed stays removed, whatever clients say.
        """
        keep = eta.keep if before is None else before.keep
        return self._left(self.prox(self._left(eta._replace(keep=keep))))

    def _left(self, eta: Eta) -> Eta:
        """Zeros for removed units, and for what reads them."""
        return self.Eta(structure.apply(structure.alive(self.groups, eta.keep, eta.mean), eta.mean), eta.keep)

    def prox(self, eta: Eta) -> Eta:
        """The argmin of the module docstring; units at 0 are no longer kept.

        Where that would be all units of a group, the one with the largest root mean square stays as it is.
        """
        norm = tree.map(torch.sqrt, structure.sums(self.groups, tree.map(torch.square, eta.mean)))
        factor = tree.map(self._factor, norm, structure.sizes(self.groups, eta.keep, eta.mean), eta.keep)
        keep = tree.map(lambda f: (f > 0).to(f), factor)
        return self.Eta(structure.close_gates(self.groups, factor, eta.mean), keep)

    def _factor(self, norm: Tensor, size: Tensor, keep: Tensor) -> Tensor:
        """What a unit's weights are multiplied by."""
        tau = self.strength * size.sqrt()
        factor = torch.where((keep > 0) & (norm > tau), 1 - tau / norm, torch.zeros_like(norm))
        if not factor.any():
            factor[torch.where(keep > 0, norm / size.sqrt(), -1.0).argmax()] = 1.0
        return factor

    def full(self, eta: Eta) -> posteriors.Point:
        """A posterior without zeros or equal values in what is left: none is longer on the wire."""
        return posteriors.Point(self._left(eta._replace(mean=tree.counted(eta.mean))).mean)

    def cut(self, eta: Eta) -> Cut:
        """The units that are left."""
        return Cut.of(self.groups, eta.keep)
