r"""Spike and slab with gates that all clients share: FedSparse for an asked density.

    z_g in {0, 1}                                      one gate per unit g, the same for all clients
    phi_sj | z_g = 1 ~ N(w_j, 1/precision),  phi_sj | z_g = 0 = 0          for each j that g owns
    log p(z) = - lambda_0 sum_g z_g cost_g             cost_g the unit's share of parameters and activations

It is the spike and slab of spike_slab.py once the clients agree, theta_g in {0, 1}. The M-step in z weighs evidence:

    gain_sg = log p(D_s | z_g = 1) - log p(D_s | z_g = 0)      nats, from the E-step (inference/gains.py)
    z = argmax sum_g z_g (e_g - lambda_0 cost_g),    e = running mean over rounds and clients of gain_s

with lambda_0 the dual variable of  live(z) <= allowed_t: the price at which what is left is what is allowed
(selection.py). A unit once removed stays removed. Gaussian M-step in w, T = (phi, gain).

    allowed_t = start^(1 - s) density^s live(1),    s = (t - hold) / steps between 0 and 1,    after round t

A round from which nothing arrived counts in t as well: z is then chosen by the evidence that there is (`idle`).

What is removed is gone from eta as well: all of it but z has the shapes of the slim model (slim.py), and z, the
`index`, says which. So has what travels in both directions, and the server step's state (`follow`).

    paper      code        shape                             paper      code          shape
    w          eta.mean    as the slim model's parameters    e          eta.gain      group -> (units left,), nats
    z          eta.keep    group -> (units,), 0 or 1         lambda_0   eta.price     {"lambda_0": scalar}, nats

Louizos et al. 2021, arXiv:2111.10192, section 4 (the prior); Cappé, Moulines 2009, arXiv:0712.4273 (the running mean);
Gallego-Posada et al. 2022, arXiv:2208.04425 (a constraint instead of a penalty).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedprior import posteriors, selection, shrinking, structure, tree
from fedprior.codecs import PayloadError
from fedprior.core import Params, Stats
from fedprior.priors.gaussian import Gaussian
from fedprior.slim import Cut, removable
from fedprior.structure import Group

_WIDER, _HOLD, _MOST = 1.55, 0.45, 1e9


@dataclass(frozen=True)
class SharedGates:
    """Gates that the server decides by evidence, as many as a density allows.

    Attributes:
        density: which fraction of the model's parameters is left in the end; None for what a budget affords.
        start: which fraction there is in round one (selection.narrow); None for 1.55 times `density`.
        steps: how many rounds the way from start to density takes; None for a fifth of the run. hold + steps may not
            exceed the rounds of the run.
        precision: pull of the clients' weights towards the server's; 0 is flat.
        memory: of the running mean of gains; 0 trusts the last round alone.
        activations: what a share of the model's activations costs, when a share of its parameters costs 1. The larger,
            the faster the model that is left; 0 looks at bytes alone.
        hold: for how many rounds the model stays as at the start; None for 0.45 of the run.
        groups: the model's units; empty until `bind` finds them.
        counted: parameter -> shape, of the model's parameters, which density counts; empty until `bind`.
        made: group -> (units,) what each unit's activations cost; None until `bind`.
    """

    density: float | None
    start: float | None = None
    steps: int | None = None
    precision: float = 0.0
    memory: float = 0.5
    activations: float = 0.1
    hold: int | None = None
    groups: tuple[Group, ...] = field(default=(), repr=False)
    counted: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    made: Params | None = field(default=None, compare=False, repr=False)
    index = ("keep",)
    uplink = ("phi", "gain")
    exact = ("keep", "gain", "price", "round")
    bounds = MappingProxyType({"gain": 1e4})  # nats

    class Eta(NamedTuple):
        """Weights that are left, gates, running gains, the price, and the rounds that are over."""

        mean: Params
        keep: Params
        gain: Params
        price: Params
        round: Params

    def __post_init__(self) -> None:
        density, start = self.density, self.start
        if density is not None and not 0 < density <= 1:
            raise ValueError(f"density is a fraction of the parameters, 0.05 for 5 %: in (0, 1], got {density}")
        if start is not None and not (density or 0) <= start <= 1:
            raise ValueError(f"start is the density to begin with, from density={density} to 1, got {start}")
        bad_rounds = (self.steps is not None and self.steps < 1) or (self.hold or 0) < 0
        numbers = (self.precision, self.activations)
        if bad_rounds or not 0 <= self.memory < 1 or not all(0 <= v < float("inf") for v in numbers):
            raise ValueError(
                "SharedGates needs steps >= 1, hold >= 0, 0 <= memory < 1 and finite precision and activations >= 0, "
                f"got {self.steps}, {self.hold}, {self.memory}, {self.precision} and {self.activations}"
            )

    def scheduled(self, rounds: int) -> SharedGates:
        """The same prior with a schedule for a run of so many rounds; a ValueError if it ends after them."""
        assert self.density is not None
        start = min(1.0, _WIDER * self.density) if self.start is None else self.start
        hold = int(_HOLD * rounds) if self.hold is None else self.hold
        steps = max(1, rounds // 5) if self.steps is None else self.steps
        if hold + steps > rounds:
            raise ValueError(
                f"SharedGates would reach its density after hold + steps = {hold} + {steps} rounds, and the run has "
                f"{rounds}: give a smaller hold or steps, or leave both out, or run {hold + steps} rounds"
            )
        return replace(self, start=start, hold=hold, steps=steps)

    def bind(self, model: nn.Module, x: Tensor) -> SharedGates:
        """The same prior with the groups of a model."""
        if self.groups:
            return self
        counted = {name: tuple(p.shape) for name, p in model.named_parameters()}
        groups = removable(model, x)
        made = selection.activations(groups, model, x)
        share = self.activations / sum(float(a.sum()) for a in made.values())
        made = tree.map(lambda a: share * a, made)
        return replace(self, groups=groups, counted=counted, made=made)

    def init(self, params: Params) -> Eta:
        """The narrow start."""
        eta = self.supposed(params, self._schedule[1] * self._total)
        return eta._replace(gain=tree.map(torch.zeros_like, eta.gain))

    def supposed(self, params: Params, left: float) -> Eta:
        """An eta of at most `left` parameters whose gains are made up: as long on the wire as a real one."""
        keep = selection.narrow(self.groups, params, left, self.counted, self.made)
        cut = Cut.of(self.groups, keep)
        mean = cut.gather(params)
        gain = structure.sums(cut.small_groups, tree.map(torch.square, mean))
        zero = next(iter(params.values())).new_zeros(())
        return self.Eta(mean, keep, gain, {"lambda_0": zero}, {"t": zero.clone()})

    @property
    def _total(self) -> int:
        return sum(map(math.prod, self.counted.values()))

    def stats(self, q: Any) -> Stats:
        """phi, the gains and, unless the prior is flat, phi squared."""
        if not hasattr(q, "gain"):
            raise TypeError(
                f"SharedGates needs a posterior with gains, and {type(q).__name__} has none. "
                "Use inference.Gains(lr=..., epochs=...)."
            )
        squares = {"phi_sq": tree.map(torch.square, q.phi)} if self.precision else {}
        return Stats({"phi": q.phi, "gain": q.gain} | squares)

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """-(precision/2) |phi - w|^2 summed over clients; z is the server's alone."""
        return Gaussian(self.precision).log_prob(Gaussian.Eta(eta.mean), t)

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Means over clients; `project` decides on the gates."""
        phi, gain = (tree.map(lambda v: v / t.clients, t[term]) for term in self.uplink)
        return eta._replace(mean=phi, gain=gain, round=tree.map(lambda t: t + 1, eta.round))

    def point(self, eta: Eta) -> Params:
        """The shared weights, with zeros for what is removed."""
        return self.whole(eta, eta.mean)

    def whole(self, eta: Eta, params: Params) -> Params:
        """Parameters of what is left as those of the full model."""
        return self.cut(eta).scatter(params)

    def cut(self, eta: Eta) -> Cut:
        """What is left of the model."""
        return Cut.of(self.groups, eta.keep)

    def left(self, eta: Eta) -> Params:
        """The weights of what is left."""
        return eta.mean

    def sized(self, like: Eta, index: Params) -> Eta:
        """An eta without values, in the shapes that these gates leave."""
        return shrinking.sized(self.groups, like, index)

    def follow(self, before: Eta, after: Eta, state: Params) -> Params:
        """The server step's state, without what is removed."""
        return shrinking.follow(self.groups, before, after, state)

    def accept(self, eta: Eta, t: Stats) -> Stats:
        """The statistics of a client; a PayloadError for gains that no E-step finds."""
        for name, gain in t["gain"].items():
            if bool((gain < 0).any()) or bool((gain > _MOST * t.clients).any()):
                raise PayloadError(f"gain/{name}: gains are nats between 0 and {_MOST:g}")
        return t

    def project(self, eta: Eta, before: Eta) -> Eta:
        """Remember the gains, and remove the units that are not worth the price.

        Args:
            eta: after the server's step.
            before: the eta of the round before: what it had removed stays removed, whatever clients say.
        """
        m = self.memory
        gain = tree.map(lambda new, old: m * old + (1 - m) * new, eta.gain, before.gain)
        return self._chosen(before._replace(mean=eta.mean, gain=gain, round=eta.round))

    def idle(self, eta: Eta) -> Eta:
        """A round from which nothing arrived: the model shrinks on time, by the gains that are remembered."""
        return self._chosen(self.unseen(eta))

    def unseen(self, eta: Eta) -> Eta:
        """The M-step of no client: a round more; `project` decides on the gates."""
        return eta._replace(round=tree.map(lambda t: t + 1, eta.round))

    def _chosen(self, eta: Eta) -> Eta:
        """Without the units for which there is no room; all stay as long as there is no evidence."""
        if not any(bool(g.any()) for g in eta.gain.values()):
            return eta
        allowed, gain = self._allowed(float(eta.round["t"])), self.cut(eta).all_units(eta.gain)
        keep, ratio = selection.select(self.groups, eta.keep, gain, self.counted, allowed, self.made)
        if all(torch.equal(z, eta.keep[g]) for g, z in keep.items()):
            return eta
        cut = shrinking.between(self.groups, eta.keep, keep)
        price = {"lambda_0": torch.full_like(eta.price["lambda_0"], ratio)}
        return self.Eta(cut.gather(eta.mean), keep, cut.units(eta.gain), price if ratio else eta.price, eta.round)

    def settled(self, eta: Eta) -> bool:
        """Is the density reached? Then no unit is removed any more, and clients need not weigh them."""
        _, _, hold, steps = self._schedule
        return float(eta.round["t"]) >= hold + steps

    def full(self, eta: Eta) -> posteriors.Gains:
        """A posterior without zeros or equal values in what is left: none is longer on the wire."""
        weighs = not self.settled(eta)
        return posteriors.Gains(tree.counted(eta.mean), tree.map(lambda g: weighs * g, tree.counted(eta.gain)))

    def live(self, eta: Eta) -> int:
        """How many parameters are left."""
        return sum(eta.mean[name].numel() for name in self.counted)

    @property
    def _schedule(self) -> tuple[float, float, int, int]:
        """density, start, hold and steps, once all are known."""
        if self.density is None or self.start is None or self.hold is None or self.steps is None:
            raise ValueError(
                "SharedGates has no schedule yet: give density, start, hold and steps, or call scheduled(rounds)"
            )
        return self.density, self.start, self.hold, self.steps

    def _allowed(self, t: float) -> float:
        """How many parameters there may be after round t."""
        density, start, hold, steps = self._schedule
        s = min(max((t - hold) / steps, 0.0), 1.0)
        return start ** (1 - s) * density**s * self._total

    def schedule(self, params: Params, rounds: int) -> list[float]:
        """How many parameters each round of a run may have, given the model's."""
        first = self.live(self.init(params))
        return [min(first, self._allowed(t)) for t in range(rounds)]
