"""A model as structure.py has it traced: after a layer that makes its inputs, and with recurrent layers in one step.

torch-pruning follows autograd's graph. In it a recurrent layer is all of its steps, hundreds of operations whose splits
it cannot follow. Here

    output = what the layer computes, without its graph, + the sum of all that it reads + mark

`mark` is a parameter as wide as the output and in no layer: what is coupled with it is left whole, and what is
concatenated with the output keeps its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def traceable(model: nn.Module, x: Tensor) -> nn.Module:
    """The model to be traced on inputs like x. Its recurrent layers get another forward: give a copy."""
    traced = nn.Sequential(*_maker(x), model)
    recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
    for i, mark in enumerate(mark for layer in recurrent for mark in _in_one_step(layer)):
        traced.register_parameter(f"mark{i}", mark)
    return traced


def _maker(x: Tensor) -> list[nn.Module]:
    """A layer that makes inputs like x: what shares its units cannot be cut."""
    if not x.is_floating_point() or x.ndim == 1:
        return []
    return [(nn.Conv2d(x.shape[1], x.shape[1], 1) if x.ndim == 4 else nn.Linear(x.shape[-1], x.shape[-1])).to(x)]


def _in_one_step(layer: nn.RNNBase | nn.RNNCellBase) -> list[nn.Parameter]:
    """Changes the layer's forward; the marks of its outputs and of its states."""
    state = getattr(layer, "proj_size", 0) or layer.hidden_size
    widths = {layer.hidden_size, state, state * (1 + getattr(layer, "bidirectional", False))}
    one = next(layer.parameters()).new_ones(2, 1)  # two rows: a parameter of one entry is not looked at
    marks = {width: nn.Parameter(one.repeat(1, width)) for width in widths}

    def forward(*inputs: Any, **named: Any) -> Any:
        read: list[Tensor] = []
        _each((*inputs, *named.values()), lambda t: read.append(t.sum()))
        with torch.no_grad():
            outputs = type(layer).forward(layer, *inputs, **named)
        return _each(outputs, lambda t: sum(read, t) + marks[t.shape[-1]].sum(0))

    layer.forward = forward
    return list(marks.values())


def _each(value: Any, f: Callable[[Tensor], Any]) -> Any:
    """f of every floating-point tensor in tuples and packed sequences, in the same structure."""
    if isinstance(value, PackedSequence):
        return value._replace(data=f(value.data))
    if isinstance(value, tuple):
        return tuple(_each(v, f) for v in value)
    return f(value) if isinstance(value, Tensor) and value.is_floating_point() else value
