"""Groups of coupled units: which slices of which parameters live and die together.

A unit is a filter of a convolution, a neuron of a dense layer, the filters that a GroupNorm averages over, or a
head of attention (linear layers of a module with an integer `head_dim`). Its group holds, over all units that are
coupled with it, the slices that make its output (it owns them: rows of weights, biases, affine parameters of
norms) and the slices that read it (columns of the next layers' weights). Every entry has at most one owner.

    z_j = z_g[unit of j] for the group g that owns entry j; 1 for an entry without owner      (`owned`)
    entry j is alive while its owner and every unit that it reads are alive                   (`alive`)
    a weight j takes its input from the units that it reads: their z_g, without its owner's   (`inputs`)

The dependency graph is torch-pruning's (Fang et al. 2023, arXiv:2301.12900).        [extra: sparse]
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedprior.core import Params
from fedprior.tracing import traceable


@dataclass(frozen=True)
class Member:
    """One parameter's part in a group.

    Attributes:
        name: the parameter.
        dim: the dimension that runs over units.
        unit: position along `dim` -> unit of the group; -1 for positions that the group does not hold.
        out: True if the slice makes the unit's output, False if it reads it.
    """

    name: str
    dim: int
    unit: tuple[int, ...]
    out: bool

    @cached_property
    def _index(self) -> Tensor:
        return torch.tensor(self.unit)

    @cached_property
    def _one_each(self) -> bool:
        return self.unit == tuple(range(len(self.unit)))

    def along(self, gate: Tensor) -> Tensor:
        """A gate (units,) read at every position of `dim`; 1 where the group holds nothing."""
        return torch.cat([gate, gate.new_ones(1)])[self._index.to(gate.device)]

    def spread(self, gate: Tensor, ndim: int) -> Tensor:
        """`along`, in a shape that broadcasts to a tensor with `ndim` dimensions."""
        return self.along(gate).view([-1 if d == self.dim else 1 for d in range(ndim)])

    def per_unit(self, values: Tensor, units: int) -> Tensor:
        """Sums over each unit's positions of `values`, (positions,) -> (units,)."""
        if self._one_each and len(values) == units:
            return values
        return values.new_zeros(units + 1).index_add(0, self._index.to(values.device) % (units + 1), values)[:units]


@dataclass(frozen=True)
class Group:
    """Units that share one gate each, and all the parameter slices they hold."""

    name: str
    units: int
    members: tuple[Member, ...]


def owned(groups: Sequence[Group], gate: Mapping[str, Tensor], params: Params) -> Params:
    """z_j of every parameter that a group owns, in a shape that broadcasts to it.

    Args:
        groups: the model's groups.
        gate: group name -> (units,) values of z_g, or their expectations.
        params: for numbers of dimensions only.
    """
    return _product(groups, gate, params, lambda m: m.out)


def alive(groups: Sequence[Group], gate: Mapping[str, Tensor], params: Params) -> Params:
    """1 for entries of which no owner and no unit read is closed (z_g = 0), else 0; shapes as in `owned`."""
    return _product(groups, {g: (z > 0).to(z) for g, z in gate.items()}, params, lambda m: True)


def inputs(groups: Sequence[Group], gate: Mapping[str, Tensor], params: Params) -> Params:
    """z_g of the units that weights take their input from; shapes as in `owned`. Running moments have no input."""
    return _product(groups, gate, params, lambda m: not m.out and m.dim == 1)


def _product(
    groups: Sequence[Group], gate: Mapping[str, Tensor], params: Params, holds: Callable[[Member], bool]
) -> Params:
    z: Params = {}
    for group in groups:
        for m in group.members:
            if holds(m):
                along = m.spread(gate[group.name], params[m.name].ndim)
                z[m.name] = z[m.name] * along if m.name in z else along
    return z


def close_gates(groups: Sequence[Group], gate: Mapping[str, Tensor], params: Params) -> Params:
    """phi * z: a closed unit's output is exactly zero."""
    return apply(owned(groups, gate, params), params)


def apply(z: Params, params: Params) -> Params:
    """`params`, those that z names times z."""
    return {k: p * z[k] if k in z else p for k, p in params.items()}


def sizes(groups: Sequence[Group], gate: Mapping[str, Tensor], params: Params) -> Params:
    """How many live entries each unit owns, group -> (units,), given which units are alive (z_g > 0)."""
    live: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        on = (gate[group.name] > 0).to(gate[group.name])
        for m in group.members:
            live[m.name, m.dim] = m.along(on) * live.get((m.name, m.dim), 1.0)
    count: Params = {g: torch.zeros_like(v) for g, v in gate.items()}
    for group in groups:
        for m in (m for m in group.members if m.out):
            shape, entries = params[m.name].shape, live[m.name, m.dim]
            for d in (d for d in range(len(shape)) if d != m.dim):
                entries = entries * (live[m.name, d].sum() if (m.name, d) in live else shape[d])
            count[group.name] = count[group.name] + m.per_unit(entries, group.units)
    return count


def sums(groups: Sequence[Group], params: Params) -> Params:
    """Sums over the entries that each unit owns, group -> (units,)."""
    total: Params = {}
    for group in groups:
        for m in (m for m in group.members if m.out):
            others = [d for d in range(params[m.name].ndim) if d != m.dim]
            values = m.per_unit(params[m.name].sum(others) if others else params[m.name], group.units)
            total[group.name] = values + total[group.name] if group.name in total else values
    return total


def groups(model: nn.Module, x: Tensor) -> tuple[Group, ...]:
    """The groups of a model; `dense_layers` tells which layers have none.

    Gates are put on Linear and Conv2d layers (depthwise ones too) with BatchNorm, GroupNorm or LayerNorm between
    them. Left whole: the last layer, embeddings, recurrent layers, grouped convolutions, and whatever a LayerNorm
    averages over, such as the residual stream of a transformer, and what is coupled with the inputs themselves.

    Args:
        model: any module torch-pruning can trace.
        x: example inputs, shape (n, ...); one is used.

    Raises:
        ModuleNotFoundError: without torch-pruning; ValueError if no unit of the model can be gated.
    """
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("sparse priors need torch-pruning: pip install 'fedprior[sparse]'") from error
    model = copy.deepcopy(model).requires_grad_(True)  # the graph is traced through autograd; frozen layers count
    names = {module: name for name, module in model.named_modules()}
    known = _known(model)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it warns of parameters outside its layers: those stay dense here
        graph: Any = torch_pruning.DependencyGraph().build_dependency(traceable(model, x), example_inputs=x[:1])
        found = [
            _group(list(items), names, known)
            for items in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear])
        ]
    kept = tuple(reversed([group for group in found if group is not None]))  # found from the output backwards
    if not kept:
        raise ValueError(
            f"no unit of {type(model).__name__} can be gated: a unit needs a Linear or Conv2d layer that makes it and "
            "another that reads it, with no LayerNorm, recurrent layer or tied weight between. "
            "Use a dense prior such as Gaussian."
        )
    return kept


def dense_layers(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Names of the layers with parameters of which no unit can be removed."""
    owned = {m.name.rpartition(".")[0] for g in groups for m in g.members if m.out}
    return [
        n for n, layer in model.named_modules() if any(True for _ in layer.parameters(recurse=False)) and n not in owned
    ]


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
_OUT = {"prune_out_channels": True, "prune_in_channels": False}


def _group(items: list[Any], names: Mapping[nn.Module, str], known: set[str]) -> Group | None:
    """One of torch-pruning's groups as ours; None for output units, coupled to one, and unknown layers."""
    parts: list[tuple[nn.Module, dict[int, int], str, int, bool]] = []
    for item in items:
        layer, unit = item.dep.target.module, dict(zip(item.idxs, item.root_idxs, strict=True))
        reads = isinstance(layer, nn.Linear | nn.Conv2d) and _OUT.get(item.dep.handler.__name__) is False
        if not item.dep.target.outputs and not reads:
            return None  # the model's outputs, which other layers may read as well
        if isinstance(layer, nn.Parameter) or (layer not in names and isinstance(layer, nn.Linear | nn.Conv2d)):
            return None
        if layer not in names or not any(True for _ in (*layer.parameters(), *layer.buffers())):
            continue  # reshapes, pooling and elementwise operations hold nothing
        held = _held(layer, _OUT.get(item.dep.handler.__name__))
        if held is None:
            return None
        parts += [
            (layer, unit, attribute, dim, owns)
            for attribute, (dim, owns) in held.items()
            if getattr(layer, attribute, None) is not None
        ]
    if not any(attribute == "weight" and not owns for _, _, attribute, _, owns in parts):
        return None  # nothing reads these units
    if any(f"{names[layer]}.{attribute}" not in known for layer, _, attribute, _, _ in parts):
        return None
    merged = _merged(parts, names)
    members = []
    for layer, unit, attribute, dim, owns in parts:
        size = getattr(layer, attribute).shape[dim]
        position = tuple(merged[unit[p]] if p in unit else -1 for p in range(size))
        members.append(Member(f"{names[layer]}.{attribute}", dim, position, owns))
    units = 1 + max(merged.values())
    return Group(names[items[0].dep.target.module], units, tuple(dict.fromkeys(members))) if units > 1 else None


def _known(model: nn.Module) -> set[str]:
    """Names of plain parameters and buffers: not those that several layers share, nor parametrised ones."""
    owners: dict[int, list[str]] = {}
    for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        owners.setdefault(id(value), []).append(name)
    return {names[0] for names in owners.values() if len(names) == 1}


def _held(layer: nn.Module, out: bool | None) -> dict[str, tuple[int, bool]] | None:
    """What a layer puts into a group: attribute -> (dimension over units, owned); None if it is not known."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        groups = getattr(layer, "groups", 1)
        if groups == 1 and out is False:
            return {"weight": (1, False)}
        depthwise = groups == getattr(layer, "in_channels", 1) == getattr(layer, "out_channels", 1)
        if out is not None and (groups == 1 or depthwise):
            return {"weight": (0, True), "bias": (0, True)}
    if isinstance(layer, _NORMS) and layer.weight is None:
        return None  # without a scale there is nothing that could close its unit
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        # running moments are cut out with their unit, but no gate scales them
        return {"weight": (0, True), "bias": (0, True), "running_mean": (0, False), "running_var": (0, False)}
    if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
        return {"weight": (0, True), "bias": (0, True)}
    return None


def _merged(
    parts: list[tuple[nn.Module, dict[int, int], str, int, bool]], names: Mapping[nn.Module, str]
) -> dict[int, int]:
    """Channel -> unit: channels that a norm averages over, or that one attention head holds, are one unit."""
    root: dict[int, int] = {}

    def find(channel: int) -> int:
        while root.setdefault(channel, channel) != channel:
            channel = root[channel]
        return channel

    modules = {name: module for module, name in names.items()}
    for layer, unit, attribute, dim, _ in parts:
        if attribute != "weight":
            continue
        block = _block(layer, modules[names[layer].rpartition(".")[0]], dim)
        first: dict[int, int] = {}
        for position, channel in unit.items():
            a, b = find(channel), find(first.setdefault(position // block, channel))
            root[max(a, b)] = min(a, b)
    number = {r: i for i, r in enumerate(sorted({find(c) for c in root}))}
    return {channel: number[find(channel)] for channel in root}


def _block(layer: nn.Module, parent: nn.Module, dim: int) -> int:
    """How many neighbouring channels of a layer stand and fall together."""
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1]
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels // layer.num_groups
    if isinstance(layer, nn.Linear) and dim == 0 and isinstance(size := getattr(parent, "head_dim", None), int):
        return size
    return 1
