"""A function of tensors as straight-line code: the operations of one call, written down and run again without a tape.

Autograd's bookkeeping takes as long as the arithmetic of a small network. The operations that it calls for tensors of
one shape are always the same, forward and backward, as long as the function decides nothing by its values: they are
recorded once, below autograd, and run again on other values. The same operations in the same order give the same bits.
Views compute nothing: one of a view is written as one of what lies below both.

A recorded function must not draw a different course from call to call: `may_be_recorded` allows networks that are put
together from PyTorch's own layers and the library's, whose operations are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedprior.graphs import Graph

LONG = (nn.RNNBase, nn.MultiheadAttention)
"""Layers of so many operations that bookkeeping is cheap beside them; cuDNN's also move their weights."""
OWN = ("torch.nn.modules.", "fedprior.models.networks")
MOST, ROOM = 64, 2**30  # shapes, and bytes of the inputs of graphs, which keep several times as much
Function = Callable[..., tuple[Any, ...]]
_UNSAFE = torch.ops.aten._unsafe_view.default  # a view that does not say so


def may_be_recorded(model: nn.Module) -> bool:
    """Is the model made of layers of `OWN`, with no state of their own, and none of `LONG`?"""
    own = all(type(m).__module__.startswith(OWN) for m in model.modules())
    hooked = any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations") for m in model.modules())
    still = not any(True for _ in model.buffers())
    return own and still and not hooked and not any(isinstance(m, LONG) for m in model.modules())


class Programs:
    """The recorded calls of one function, for each shape of its tensors; further shapes than `MOST` run as they are.

    Recording takes as long as a few calls: it is done when a shape comes for the second time. On a GPU, one that comes
    again is captured as a CUDA graph, as long as there is `ROOM`.
    """

    def __init__(self, function: Function) -> None:
        self._function, self._room = function, ROOM
        self._programs: dict[Any, Function] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """What the function gives."""
        key = tuple([(t.shape, t.stride(), t.dtype, t.device) for t in inputs])
        program = self._programs.get(key)
        if program is None:
            if len(self._programs) < MOST:
                self._programs[key] = self._function
            return self._function(*inputs)
        if program is self._function:
            self._programs[key], outputs = record(program, *inputs)
            return outputs
        if inputs[0].is_cuda and not isinstance(program, Graph):
            size = sum(t.nbytes for t in inputs)
            if size <= self._room:
                program = self._programs[key] = Graph(program, inputs)
                self._room -= size
        return program(*inputs)


def record(function: Function, *inputs: Tensor) -> tuple[Function, tuple[Any, ...]]:
    """The operations of one call of `function`, as a function of the same tensors, and what the call gave.

    Whatever else the call reads is kept as it was.
    """
    recorder = _Recorder(inputs)
    with recorder:
        outputs = function(*inputs)
    return recorder.program(outputs), outputs


class _Recorder(TorchDispatchMode):
    """Writes a line of Python for every operation that is called while it is entered."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch's question: else the first operation imports its compiler, which takes seconds."""
        return False

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._alive: list[Tensor] = []  # a tensor's name hangs on its id, which a dead one would pass on
        self._names: dict[int, str] = {}
        self._values: dict[str, Any] = {}
        self._lines: list[tuple[list[str], set[str], str, bool]] = []  # what it sets, reads; its text; must it stay?
        self._bases: dict[int, Tensor] = {}  # of views
        self._inputs = [self._named(t, "x") for t in inputs]
        self._given = {t.untyped_storage().data_ptr() for t in self._alive}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, and write down."""
        outputs = func(*args, **(kwargs or {}))
        if view := self._view(func, args, outputs):
            func, args, kwargs = torch.ops.aten.as_strided.default, view, {}
        reads: set[str] = set()
        given = [self._text(a, reads) for a in args]
        given += [f"{k}={self._text(v, reads)}" for k, v in (kwargs or {}).items()]
        if len(args) == 1 and view:
            self._alive.append(outputs)
            self._names[id(outputs)] = given[0]
            return outputs
        call = f"{self._value(_quick(func), 'f')}({', '.join(given)})"
        several = isinstance(outputs, tuple | list)
        sets = [self._named(t, "v") if isinstance(t, Tensor) else "_" for t in (outputs if several else [outputs])]
        stays = func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags
        self._lines.append((sets, reads, f"{', '.join(sets)}{',' * several} = {call}", stays))
        return outputs

    def program(self, outputs: Iterable[Any]) -> Function:
        """What was recorded, without the lines that nothing reads; a value is forgotten after its last use."""
        results = ["None" if t is None else self._names[id(t)] for t in outputs]
        needed, text = set(results), [f"return {', '.join(results)},"]
        for sets, reads, line, stays in reversed(self._lines):
            if not stays and needed.isdisjoint(sets):
                continue
            last = sorted({*reads, *(s for s in sets if s != "_")} - needed - self._values.keys())
            text += [f"del {', '.join(last)}"] * bool(last) + [line]
            needed |= reads
        body = "\n    ".join(reversed(text))
        scope = dict(self._values)
        exec(f"def program({', '.join(self._inputs)}):\n    {body}", scope)
        return scope.pop("program")  # else it would hold itself, and be freed late

    def _view(self, func: Any, args: Any, view: Any) -> tuple[Any, ...]:
        """What `as_strided` makes a view of: what lies below all views, size, strides and where it begins.

        Only the first of these where they are the same; nothing where it is no view, or begins in the midst of an
        input, whose place in memory is another one in every call.
        """
        if not (func.is_view or func is _UNSAFE) or not isinstance(view, Tensor) or view.layout is not torch.strided:
            return ()
        base: Any = self._bases.get(id(args[0]), args[0])
        moved = view.storage_offset() != base.storage_offset()
        astray = moved and base.untyped_storage().data_ptr() in self._given
        if astray or view.dtype != base.dtype or view.is_complex() or view.is_neg():
            return ()
        self._bases[id(view)] = base
        same = (base.shape, base.stride()) == (view.shape, view.stride()) and not moved
        return (base,) if same else (base, view.shape, view.stride(), *[view.storage_offset()] * moved)

    def _named(self, tensor: Tensor, kind: str) -> str:
        if id(tensor) not in self._names:
            self._alive.append(tensor)
            self._names[id(tensor)] = f"{kind}{len(self._names)}"
        return self._names[id(tensor)]

    def _value(self, value: Any, kind: str) -> str:
        """The name of what is no result of the recorded call."""
        name = next((n for n, v in self._values.items() if v is value), f"{kind}{len(self._values)}_")
        self._values[name] = value
        return name

    def _text(self, value: Any, reads: set[str]) -> str:
        """An argument as Python text."""
        if isinstance(value, list):
            return f"[{', '.join(self._text(v, reads) for v in value)}]"
        if isinstance(value, tuple):
            return repr(tuple(value))
        if isinstance(value, Tensor):
            name = self._names.get(id(value)) or self._value(value, "c")
            reads.add(name)
            return name
        return repr(value) if value is None or isinstance(value, bool | int) else self._value(value, "c")


def _quick(operation: Any) -> Any:
    """The same operation as PyTorch's Python binding has it, which is called in half the time; else itself."""
    name = operation._schema.name.removeprefix("aten::")
    return next((getattr(home, name) for home in (torch, Tensor) if hasattr(home, name)), operation)
