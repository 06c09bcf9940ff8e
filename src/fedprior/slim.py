"""Physically smaller models: what is left when removed units are cut out, and the way there and back.

    gather    parameters of the full model -> those of the slim one        scatter    back, zeros where cut
    gather(scatter(p)) = p;  slim(model, ...) computes what the full model computes with its removed units closed

A unit is removed when its gate is 0 (structure.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fedprior import structure
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

    @cached_property
    def _sizes(self) -> dict[tuple[str, int], int]:
        """(parameter, dimension) -> positions of the full model."""
        return {(m.name, m.dim): len(m.unit) for group in self.groups for m in group.members}

    @property
    def touched(self) -> list[str]:
        """Names of the parameters and buffers that groups hold."""
        return list(dict.fromkeys(name for name, _ in self._positions))

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
            if name in small:
                small[name] = small[name].index_select(dim, index.to(small[name].device))
        return small

    def shape(self, name: str, full: Sequence[int]) -> tuple[int, ...]:
        """What is left of a parameter's shape."""
        left = {dim: len(index) for (other, dim), index in self._positions.items() if other == name}
        return tuple(left.get(dim, size) for dim, size in enumerate(full))

    def scatter(self, small: Params) -> Params:
        """The full model's parameters; 0 where something was cut out."""
        full = dict(small)
        for (name, dim), index in self._positions.items():
            shape = list(full[name].shape)
            shape[dim] = self._sizes[name, dim]
            full[name] = full[name].new_zeros(shape).index_copy(dim, index.to(full[name].device), full[name])
        return full


def removable(model: nn.Module, x: Tensor) -> tuple[Group, ...]:
    """The groups of structure.py, of a model that has been tried without one unit of each.

    Args:
        model: as in structure.groups.
        x: example inputs, shape (n, ...); one is used.

    Raises:
        ValueError: for a `forward` that hard-codes a width, and as structure.groups.
    """
    found = structure.groups(model, x)
    if not _why_not(model, found, found, x):
        return found
    named = next((g.name for g in found if _why_not(model, found, [g], x)), found[0].name)
    raise ValueError(
        f"units of {named!r} cannot be removed: without one, {type(model).__name__} fails: "
        f"{_why_not(model, found, found, x)}. Its forward hard-codes a width: write x.flatten(1) for x.view(-1, 800), "
        "attention as in docs/fedsparse.md, or use a dense prior such as Gaussian"
    )


def _why_not(model: nn.Module, groups: tuple[Group, ...], fewer: Sequence[Group], x: Tensor) -> str:
    """What goes wrong in the model without the last unit of each of `fewer`; empty if nothing does."""
    names = {g.name for g in fewer}
    small = slim(model, Cut(groups, {g.name: tuple(range(g.units - (g.name in names))) for g in groups})).eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            small(x[:1])
    except Exception as error:  # whatever a forward of the user's raises
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""


def slim(model: nn.Module, cut: Cut) -> nn.Module:
    """A smaller copy of the model, with the weights that are left.

    Sizes that layers keep as attributes follow (out_features, num_groups, num_heads, ...); a `forward` that
    hard-codes a width, as in x.view(-1, 800), has to ask the layer instead.
    """
    tensors = {k: v.detach() for k, v in [*model.named_parameters(), *model.named_buffers()]}
    return resized(model, {name: cut.gather({name: tensors[name]})[name] for name in cut.touched})


def resized(model: nn.Module, tensors: Params) -> nn.Module:
    """A copy of the model with these parameters and buffers, of whatever size; layers' attributes follow."""
    small = copy.deepcopy(model)
    for name, value in tensors.items():
        owner, _, attribute = name.rpartition(".")
        layer = small.get_submodule(owner)
        if attribute in layer._parameters:
            before = layer._parameters[attribute]
            value = nn.Parameter(value, requires_grad=before is not None and before.requires_grad)
        setattr(layer, attribute, value)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    for owner in owners:
        _resize(small.get_submodule(owner))
    for parent in dict.fromkeys(owner.rpartition(".")[0] for owner in owners):
        _recount_heads(small.get_submodule(parent))
    return small


SIZED = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)
"""The layers that can be resized."""


def _resize(layer: nn.Module) -> None:
    """Attributes that repeat the shape of a layer's weights."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            layer.groups = layer.weight.shape[0]  # depthwise, the only grouped convolution that is cut
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.weight is not None:
        layer.num_features = len(layer.weight)
    elif isinstance(layer, nn.GroupNorm) and layer.weight is not None:
        layer.num_groups = layer.num_groups * len(layer.weight) // layer.num_channels
        layer.num_channels = len(layer.weight)


def _recount_heads(parent: nn.Module) -> None:
    """`num_heads` of an attention module, if it keeps one."""
    if isinstance(size := getattr(parent, "head_dim", None), int) and hasattr(parent, "num_heads"):
        rows = min(child.out_features for child in parent.children() if isinstance(child, nn.Linear))
        vars(parent)["num_heads"] = rows // size
