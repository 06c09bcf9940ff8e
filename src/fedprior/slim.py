"""Physically smaller models: what is left when removed units are cut out, and the way there and back.

    gather    parameters of the full model -> those of the slim one        scatter    back, zeros where cut
    gather(scatter(p)) = p;  slim(model, ...) computes what the full model computes with its removed units closed

A unit is removed when its gate is 0 (structure.py). torch-pruning cuts the layers.                 [extra: sparse]
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedprior.core import Params
from fedprior.structure import Group, Member


@dataclass(frozen=True)
class Cut:
    """Which units of which groups are left.

    Attributes:
        groups: those of the full model.
        kept: group -> numbers of the units that are left, ascending.
    """

    groups: tuple[Group, ...]
    kept: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, groups: tuple[Group, ...], gate: Mapping[str, Tensor]) -> Cut:
        """Keep the units whose gate is not 0."""
        return cls(groups, {g: tuple(z.nonzero().flatten().tolist()) for g, z in gate.items()})

    @cached_property
    def small_groups(self) -> tuple[Group, ...]:
        """The groups of the slim model."""
        return tuple(
            Group(g.name, len(self.kept[g.name]), tuple(self._small(g, m) for m in g.members)) for g in self.groups
        )

    def _small(self, group: Group, m: Member) -> Member:
        new = {unit: i for i, unit in enumerate(self.kept[group.name])} | {-1: -1}
        return Member(m.name, m.dim, tuple(new[m.unit[p]] for p in self._positions[m.name, m.dim].tolist()), m.out)

    @cached_property
    def _positions(self) -> dict[tuple[str, int], Tensor]:
        """(parameter, dimension) -> positions that are left."""
        left: dict[tuple[str, int], Tensor] = {}
        for group in self.groups:
            on = torch.zeros(group.units, dtype=torch.bool)
            on[list(self.kept[group.name])] = True
            for m in group.members:
                left[m.name, m.dim] = m.along(on) & left.get((m.name, m.dim), torch.tensor(True))
        return {key: on.nonzero().flatten() for key, on in left.items()}

    @property
    def removed(self) -> int:
        """How many units are gone."""
        return sum(g.units - len(self.kept[g.name]) for g in self.groups)

    def units(self, gates: Mapping[str, Tensor]) -> Params:
        """Values per unit, of the units that are left."""
        return {g: v[torch.tensor(self.kept[g], device=v.device)] for g, v in gates.items()}

    def all_units(self, gates: Mapping[str, Tensor]) -> Params:
        """The inverse of `units`, 0 for removed units."""
        full: Params = {}
        for g in self.groups:
            index = torch.tensor(self.kept[g.name], device=gates[g.name].device)
            full[g.name] = gates[g.name].new_zeros(g.units).index_copy(0, index, gates[g.name])
        return full

    def gather(self, params: Params) -> Params:
        """The slim model's parameters, copies."""
        small = {name: value.clone() for name, value in params.items()}
        for (name, dim), index in self._positions.items():
            small[name] = small[name].index_select(dim, index.to(small[name].device))
        return small

    def scatter(self, small: Params, like: Params) -> Params:
        """The full model's parameters, shaped as `like`; 0 where something was cut out."""
        full = dict(small)
        for (name, dim), index in self._positions.items():
            shape = list(full[name].shape)
            shape[dim] = like[name].shape[dim]
            full[name] = full[name].new_zeros(shape).index_copy(dim, index.to(full[name].device), full[name])
        return full


def slim(model: nn.Module, cut: Cut, x: Tensor) -> nn.Module:
    """A smaller copy of the model, with the weights that are left.

    Args:
        model: the full model; it is not changed.
        cut: what is left.
        x: example inputs, shape (n, ...); one is used for tracing.
    """
    import torch_pruning

    small = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside its layers, which stay whole
        graph: Any = torch_pruning.DependencyGraph().build_dependency(small, example_inputs=x[:1])
    for group in cut.groups:
        layer = small.get_submodule(group.name)
        gone = sorted(set(range(group.units)) - set(cut.kept[group.name]))
        if gone:
            prune = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, prune, gone).prune()
    return small.train(model.training)
