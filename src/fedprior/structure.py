"""Groups of coupled units: which slices of which parameters live and die together.

A unit is a filter of a convolution or a neuron of a dense layer. Its group holds, over all units that are
coupled with it, the slices that make its output ("out": rows of weights, biases, affine parameters of norms)
and the slices that read it ("in": columns of the next layers' weights). A parameter entry is alive while
every group that holds it has its unit open:

    z_j = product over the groups g that hold entry j of z_g[unit of j]

The dependency graph is torch-pruning's (Fang et al. 2023, arXiv:2301.12900).        [extra: sparse]
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedprior.core import Params


@dataclass(frozen=True)
class Member:
    """One parameter's part in a group.

    Attributes:
        name: the parameter.
        dim: the dimension that runs over units.
        unit: position along `dim` -> unit of the group.
        out: True if the slice makes the unit's output, False if it reads it.
    """

    name: str
    dim: int
    unit: tuple[int, ...]
    out: bool

    def spread(self, gate: Tensor, ndim: int) -> Tensor:
        """A gate (units,) laid along `dim` of a tensor with `ndim` dimensions, 1 elsewhere."""
        along = gate[torch.tensor(self.unit, device=gate.device)]
        return along.view([-1 if d == self.dim else 1 for d in range(ndim)])


@dataclass(frozen=True)
class Group:
    """Units that share one gate each, and all the parameter slices they hold."""

    name: str
    units: int
    members: tuple[Member, ...]


def alive(groups: Iterable[Group], gate: Mapping[str, Tensor], params: Params) -> Params:
    """z_j of every parameter, in a shape that broadcasts to it; 1 where no group holds it.

    Args:
        groups: the model's groups.
        gate: group name -> (units,) values of z_g, or their expectations.
        params: for names and numbers of dimensions only.
    """
    z = {name: value.new_ones([1] * value.ndim) for name, value in params.items()}
    for group in groups:
        for m in group.members:
            z[m.name] = z[m.name] * m.spread(gate[group.name], params[m.name].ndim)
    return z


def close_gates(groups: Iterable[Group], gate: Mapping[str, Tensor], params: Params) -> Params:
    """phi * z on the slices that make the units' outputs: a closed unit's output is exactly zero."""
    gated = dict(params)
    for group in groups:
        for m in group.members:
            if m.out:
                gated[m.name] = gated[m.name] * m.spread(gate[group.name], params[m.name].ndim)
    return gated


def count_alive(z: Params, params: Params) -> int:
    """How many entries of `params` have z_j > 0."""
    return sum(int((z[k] > 0).sum()) * (p.numel() // z[k].numel()) for k, p in params.items())


def groups(model: nn.Module, x: Tensor) -> tuple[Group, ...]:
    """The groups of a model of Linear and Conv2d layers; the units of the last layer are left whole.

    Args:
        model: any module torch-pruning can trace; layers of other types stay dense.
        x: example inputs, shape (n, ...); one is used.

    Raises:
        ModuleNotFoundError: if torch-pruning is not installed.
        ValueError: if no unit of the model can be gated.
    """
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("sparse priors need torch-pruning: pip install 'fedprior[sparse]'") from error
    names = {module: name for name, module in model.named_modules()}
    training = model.training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of parameters outside its layers: those stay dense here
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x[:1])
        found = [
            _group(list(items), names) for items in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear])
        ]
    model.train(training)
    kept = tuple(reversed([group for group in found if group is not None]))  # found from the output backwards
    if not kept:
        raise ValueError(
            f"no unit of {type(model).__name__} can be gated: none of its Linear or Conv2d layers feeds another. "
            "Use a dense prior such as Gaussian."
        )
    return kept


_OUT = {"prune_out_channels": True, "prune_in_channels": False}


def _group(items: list[Any], names: Mapping[nn.Module, str]) -> Group | None:
    """One of torch-pruning's groups as ours; None for output units and unknown layers."""
    members: list[Member] = []
    for item in items:
        node, unit = item.dep.target, tuple(int(i) for i in item.root_idxs)
        if node.module not in names or not any(True for _ in node.module.parameters()):
            continue  # reshapes, pooling and elementwise operations hold no parameters
        layer, out = node.module, _OUT.get(item.dep.handler.__name__)
        if isinstance(layer, nn.Linear | nn.Conv2d) and getattr(layer, "groups", 1) == 1 and out is not None:
            members.append(Member(f"{names[layer]}.weight", 0 if out else 1, unit, out))
            affine = ["bias"] if out else []
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            affine = ["weight", "bias"]
        else:
            return None
        members += [
            Member(f"{names[layer]}.{a}", 0, unit, True) for a in affine if getattr(layer, a, None) is not None
        ]
    if all(m.out for m in members):
        return None  # nothing reads these units: they are the model's outputs
    unique = tuple(dict.fromkeys(members))
    return Group(names[items[0].dep.target.module], 1 + max(max(m.unit) for m in unique), unique)
