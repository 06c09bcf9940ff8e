r"""Federated dropout: every client of a round is sent, trains and returns a random part of the model.

    z_sg = 1 for k_g of group g's n_g units, drawn anew for each client and round;   k_g = ceil((1 - rate) n_g)
    a_sj = 1 if client s holds entry j: its owner and all units that it reads have z = 1       (structure.alive)
    phi_sj | a_sj = 1 ~ N(w_j, 1/precision);   what a client does not hold has no phi

    log_prob = -(precision/2) sum_s sum_j a_sj (phi_sj - w_j)^2
    T = (a, a phi, a phi^2);   M-step  w_j = sum_s a_sj phi_sj / sum_s a_sj;   w_j stays where nobody holds j

    paper    code        shape                      paper    code           shape
    w        eta.mean    as the parameters          a        t.alive        broadcasts to the parameters, sums
    k / n    eta.keep    group -> (units,)          a phi    t.alive_phi    as the parameters, sums over clients

In a client's eta `keep` is z itself. The server drew z, so a client sends a phi alone, and the server adds a: nobody
has to be believed about what it holds, and an upload with anything else in it is refused. The price is that the server
sees each upload: masks do not survive a secure sum that hides who sent what.

Scale. w is meant for the parts of the model. `point`, the whole model, reads each unit z_g times its probability,
k_g/n_g, and `init` divides by it, so that a run starts from the model it was given. As groups are drawn one by one,

    E_z[f(x; part z of w)] = f(x; point)     for a linear f in which no path visits a group twice,

and approximately for others, as with any dropout; the running moments of a batch norm are those of parts, whose
variance is not the whole model's: at high rates take a group norm. Entries that no group owns or reads are FedAvg's.

Caldas, Konečný, McMahan, Talwalkar 2018, arXiv:1812.07210; the scale is that of Srivastava et al. 2014.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedprior import posteriors, structure, tree
from fedprior.codecs import PayloadError
from fedprior.core import Params, Stats
from fedprior.slim import Cut, removable
from fedprior.structure import Group


@dataclass(frozen=True)
class Dropout:
    """A random part of the model for each client.

    Attributes:
        rate: share of every group's units that a client does without, 0 <= rate < 1; one unit at least is kept.
        precision: pull of a weight towards the server's, in nats per client's data set; 0 is flat.
        groups: the model's units; empty until `bind` finds them.
    """

    rate: float = 0.5
    precision: float = 0.0
    groups: tuple[Group, ...] = ()
    uplink = ("alive", "alive_phi")

    class Eta(NamedTuple):
        """Shared weights, and the probability that a client has a unit (in a client's own eta: 1 or 0)."""

        mean: Params
        keep: Params

    def __post_init__(self) -> None:
        if not (0 <= self.rate < 1 and 0 <= self.precision < math.inf):
            raise ValueError(f"need 0 <= rate < 1 and a finite precision >= 0, got {self.rate} and {self.precision}")

    def bind(self, model: nn.Module, x: Tensor) -> Dropout:
        """The same prior with the groups of a model."""
        return self if self.groups else replace(self, groups=removable(model, x))

    def init(self, params: Params) -> Eta:
        """The weights whose `point` is `params`."""
        like = next(iter(params.values()))
        keep = {g.name: like.new_full((g.units,), self._kept(g) / g.units) for g in self.groups}
        inverse = tree.map(torch.reciprocal, structure.inputs(self.groups, keep, params))
        return self.Eta(structure.apply(inverse, params), keep)

    def _kept(self, group: Group) -> int:
        """k_g; the product is rounded first, or 0.7 of 10 units would leave 4."""
        return max(1, math.ceil(round((1 - self.rate) * group.units, 9)))

    def sample(self, eta: Eta, rng: torch.Generator) -> Eta:
        """One client's part: z, and the weights that it holds; zeros elsewhere."""
        gate: Params = {}
        for g in self.groups:
            chosen = torch.randperm(g.units, generator=rng)[: self._kept(g)].to(eta.keep[g.name].device)
            gate[g.name] = torch.zeros_like(eta.keep[g.name]).index_fill(0, chosen, 1.0)
        return self.Eta(structure.apply(structure.alive(self.groups, gate, eta.mean), eta.mean), gate)

    def full(self, eta: Eta) -> posteriors.Point:
        """A posterior whose message has no zeros or equal values in the client's part: none is longer on the wire."""
        return posteriors.Point(tree.counted(eta.mean))

    def cut(self, eta: Eta) -> Cut:
        """What a client trains."""
        return Cut.of(self.groups, eta.keep)

    def stats(self, q: Any) -> Stats:
        """What a posterior holds, everything if it has no gates, and its moments there."""
        phi, gate = q.mean(), getattr(q, "gate", None)
        if gate is None:
            like = next(iter(phi.values()))
            gate = {g.name: like.new_ones(g.units) for g in self.groups}
        alive = structure.alive(self.groups, gate, phi)
        squares = structure.apply(alive, q.second_moment())
        return Stats({"alive": alive, "alive_phi": structure.apply(alive, phi), "alive_phi_sq": squares})

    def message(self, eta: Eta, q: Any) -> Stats:
        """The weights that the client holds."""
        if hasattr(q, "gate"):
            raise TypeError(
                f"Dropout's gates are drawn by the server, and {type(q).__name__} has gates of its own. "
                "Use inference.Point(lr=..., epochs=...), or the prior SpikeSlab to learn gates."
            )
        return Stats({"phi": structure.apply(structure.alive(self.groups, eta.keep, eta.mean), q.mean())})

    def accept(self, eta: Eta, t: Stats) -> Stats:
        """a and a phi of a client that was sent eta; a PayloadError if there are values that it does not hold."""
        alive = structure.alive(self.groups, eta.keep, eta.mean)
        alive_phi = structure.apply(alive, t["phi"])
        if foreign := [name for name, phi in t["phi"].items() if not torch.equal(phi, alive_phi[name])]:
            raise PayloadError(f"{', '.join(foreign)}: values for units that the client was not sent")
        return Stats({"alive": tree.map(lambda a: t.clients * a, alive), "alive_phi": alive_phi}, t.clients)

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """The sum of the module docstring."""
        if self.precision == 0:
            return torch.zeros(())

        def square(w: Tensor, a: Tensor, a_phi: Tensor, a_phi_sq: Tensor) -> Tensor:
            return a_phi_sq - 2 * w * a_phi + a * w**2

        squares = tree.map(square, eta.mean, self._holders(eta, t), t["alive_phi"], t["alive_phi_sq"])
        return -0.5 * self.precision * tree.total(squares)

    def _holders(self, eta: Eta, t: Stats) -> Params:
        """sum_s a_sj of every parameter: how many clients hold it."""
        a = t["alive"]
        return {k: a[k] if k in a else w.new_full([1] * w.ndim, t.clients) for k, w in eta.mean.items()}

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """The mean over the clients that hold a weight; one that nobody holds stays."""

        def mean(w: Tensor, a: Tensor, a_phi: Tensor) -> Tensor:
            return torch.where(a > 0, a_phi / torch.where(a > 0, a, 1), w)

        return self.Eta(tree.map(mean, eta.mean, self._holders(eta, t), t["alive_phi"]), eta.keep)

    def point(self, eta: Eta) -> Params:
        """The weights, times the probability of what they read; a client's part as it is, if eta is a client's."""
        return structure.apply(structure.inputs(self.groups, eta.keep, eta.mean), eta.mean)
