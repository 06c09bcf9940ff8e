r"""Which units to keep: as much gain as a number of parameters can buy.

    maximise  sum_g z_g gain_g    subject to  live(z) <= allowed,    z_g in {0, 1}
    live(z) = sum over parameters of prod_d n_d,    n_d = positions of dimension d that are left
    greedy: while live > allowed, close the unit with the least  gain_g / cost_g
    cost_g = (live(z) - live(z without g)) / live(1) + c a_g / sum_h a_h,    a_g = values that g puts out for an example

A cost is a share of the model's parameters, which are bytes, and c times a share of its activations, which are time
and memory: by parameters alone the first filters of a convolutional network are nearly free, and nearly all its time.
The ratio of the last unit that was closed is the price lambda_0, in nats for the cost 1. Greedy by ratio is optimal
for the relaxation in which a part of a unit can be kept (Dantzig 1957), if the cost is that of the constraint and does
not depend on other units. Every group keeps its best unit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedprior import structure, tree
from fedprior.core import Params
from fedprior.structure import Group

Key = tuple[str, int]
_TINY = 1e-300


def activations(groups: Sequence[Group], model: nn.Module, x: Tensor) -> Params:
    """How many values each unit puts out for one example, over all layers that make it: group -> (units,).

    Args:
        groups: the model's units.
        model: any module; it is run once, in evaluation mode.
        x: example inputs, shape (n, ...); one is used.
    """
    model = copy.deepcopy(model).eval()
    positions: dict[str, float] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):

            def count(layer: nn.Linear | nn.Conv2d, _: Any, output: Tensor, name: str = f"{name}.weight") -> None:
                positions[name] = positions.get(name, 0.0) + output.numel() / len(layer.weight)

            layer.register_forward_hook(count)
    with torch.no_grad():
        model(x[:1])
    made: Params = {g.name: torch.zeros(g.units) for g in groups}
    for group in groups:
        for m in (m for m in group.members if m.out and m.name in positions):
            ones = torch.full((len(m.unit),), positions[m.name])
            made[group.name] = made[group.name] + m.per_unit(ones, group.units)
    return made


class Live:
    """How many entries of the parameters are left, and what goes with each unit.

    Args:
        groups: the model's units.
        keep: group -> (units,); 0 for units that are closed already.
        shapes: parameter -> shape; only these parameters count.
        made: c a_g / sum_h a_h of every unit, group -> (units,); None for 0.

    Attributes:
        entries: parameter -> how many are left.
    """

    def __init__(
        self, groups: Sequence[Group], keep: Params, shapes: Mapping[str, Sequence[int]], made: Params | None = None
    ) -> None:
        self._shapes = shapes
        self._all = sum(math.prod(shape) for shape in shapes.values())
        made = made or {g.name: torch.zeros(g.units) for g in groups}
        self._made = {g: a.double().cpu().numpy() for g, a in made.items()}
        self.open = {g.name: (keep[g.name] > 0).cpu().numpy() for g in groups}
        self._puts_out = {g: self._activations(g) for g in self.open}
        left: dict[Key, np.ndarray] = {}
        for group in groups:
            for m in group.members:
                on = np.append(self.open[group.name], True)[list(m.unit)]
                left[m.name, m.dim] = on & left.get((m.name, m.dim), True)
        self._left = {key: int(on.sum()) for key, on in left.items()}
        self._held: dict[str, dict[Key, np.ndarray]] = {g.name: {} for g in groups}
        for group in groups:
            held = self._held[group.name]
            for m in group.members:
                held[m.name, m.dim] = np.bincount(np.array(m.unit)[left[m.name, m.dim]] + 1, minlength=group.units + 1)[
                    1:
                ]
        self._names = {g: {name for name, _ in held if name in shapes} for g, held in self._held.items()}
        self._rows = {g.name: {m.name for m in g.members if m.out and m.name in shapes} for g in groups}
        self.entries = {name: int(self._entries(name, {})) for name in shapes}
        self._total = sum(self.entries.values())

    def total(self) -> int:
        """Entries that are left."""
        return self._total

    def _entries(self, name: str, less: Mapping[Key, np.ndarray]) -> np.ndarray:
        """Entries of one parameter when every dimension has lost `less` positions."""
        counts = [self._left.get((name, d), size) - less.get((name, d), 0) for d, size in enumerate(self._shapes[name])]
        return np.asarray(math.prod(counts))

    def _activations(self, group: str) -> float:
        return float(self._made[group][self.open[group]].sum())

    def costs(self, group: str) -> np.ndarray:
        """Entries that go with each unit of a group, (units,)."""
        held, none = self._held[group], np.zeros(len(self.open[group]), int)
        return sum((self.entries[n] - self._entries(n, held) for n in self._names[group]), none)

    def shares(self, group: str) -> np.ndarray:
        """cost_g of each unit of a group, (units,)."""
        return self.costs(group) / self._all + self._made[group]

    def owned(self, group: Group) -> int:
        """Entries that the open units of a group own."""
        return sum(self.entries[name] for name in self._rows[group.name])

    def weight(self, group: Group) -> float:
        """What a group owns and puts out, as shares of the model."""
        return self.owned(group) / self._all + self._puts_out[group.name]

    def close(self, group: str, unit: int) -> None:
        """Take one open unit out."""
        self.open[group][unit] = False
        for key, positions in self._held[group].items():
            self._left[key] -= int(positions[unit])
        for name in self._names[group]:
            before, self.entries[name] = self.entries[name], int(self._entries(name, {}))
            self._total += self.entries[name] - before
        self._puts_out[group] = self._activations(group)


def select(
    groups: Sequence[Group],
    keep: Params,
    gain: Params,
    shapes: Mapping[str, Sequence[int]],
    allowed: float,
    made: Params | None = None,
) -> tuple[Params, float]:
    """Close units of `keep` until at most `allowed` entries are left.

    Args:
        groups: the model's units.
        keep: group -> (units,); 0 for units that are closed and stay so.
        gain: group -> (units,) what keeping each unit is worth; any unit of measure.
        shapes: parameter -> shape, of those that count (buffers, say, do not).
        allowed: number of their entries.
        made: c a_g / sum_h a_h of every unit, group -> (units,); None for 0.

    Returns:
        The new `keep`, ones and zeros, and the price: gain per cost of the last unit closed, 0 if there was none.
    """
    live = Live(groups, keep, shapes, made)
    worth = {g: v.double().cpu().numpy() for g, v in gain.items()}
    price = 0.0
    while live.total() > allowed:
        ratio, group, unit = min(_cheapest(live, worth[g.name], g.name) for g in groups)
        if ratio == math.inf:
            break
        live.close(group, unit)
        price = ratio
    return {g: torch.from_numpy(live.open[g]).to(v) for g, v in keep.items()}, price


def _cheapest(live: Live, worth: np.ndarray, group: str) -> tuple[float, str, int]:
    """The open unit of a group with the least gain per cost; a ratio of infinity for a group's last unit."""
    open_units = live.open[group]
    if open_units.sum() <= 1:
        return math.inf, group, -1
    ratio = np.where(open_units, worth / np.maximum(live.shares(group), _TINY), math.inf)
    unit = int(ratio.argmin())
    return float(ratio[unit]), group, unit


def smallest(groups: Sequence[Group], shapes: Mapping[str, Sequence[int]]) -> Live:
    """What is left when each group has one unit, that with the fewest entries: no model has less."""
    one = {g.name: torch.ones(g.units) for g in groups}
    whole = Live(groups, one, shapes)
    for group, keep in one.items():
        fewest = int(whole.costs(group).argmin())
        keep.zero_()[fewest] = 1
    return Live(groups, one, shapes)


def least(groups: Sequence[Group], shapes: Mapping[str, Sequence[int]]) -> int:
    """How many entries the smallest model has."""
    return smallest(groups, shapes).total()


def narrow(
    groups: Sequence[Group], params: Params, allowed: float, counted: Collection[str], made: Params | None = None
) -> Params:
    """A start without evidence: the group that weighs the most gives up its smallest unit, again and again.

    A group weighs the share of the parameters that it owns plus c times the share of the activations that it makes.

    Large layers become the sparser ones, as in the Erdős-Rényi allocations of sparse training (Evci et al. 2020,
    arXiv:1911.11134, section 3).

    Args:
        groups: the model's units.
        params: the weights; a unit is small if the squares that it owns add up to little.
        allowed: stop at so many entries of the counted parameters (or at one unit a group).
        counted: names of the parameters that count.
        made: c a_g / sum_h a_h of every unit, group -> (units,); None for 0.

    Returns:
        Ones and zeros, group -> (units,).
    """
    like = next(iter(params.values()))
    keep = {g.name: like.new_ones(g.units) for g in groups}
    live = Live(groups, keep, {name: params[name].shape for name in counted}, made)
    squares = structure.sums(groups, tree.map(torch.square, params))
    smallest = {g: s.argsort(stable=True).tolist()[:-1] for g, s in squares.items()}
    while live.total() > allowed and any(smallest.values()):
        group = max((g for g in groups if smallest[g.name]), key=live.weight)
        live.close(group.name, smallest[group.name].pop(0))
    return {g: torch.from_numpy(live.open[g]).to(v) for g, v in keep.items()}
