"""A function of tensors on a GPU as a CUDA graph: one launch instead of one an operation.

A step of a small network launches dozens of kernels, each of which takes the processor longer to launch than the GPU to
run. The graph is captured once, of the operations that one call launches, and replayed on other values: they are copied
to where the call read them, and the results from where it wrote them. The same kernels give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM = 2  # calls before the capture, in which libraries allocate what they need
_FIRST: dict[torch.device, Any] = {}


class Graph:
    """A function that has no effects, launches the same kernels in each call, and asks the GPU for no value."""

    def __init__(self, function: Callable[..., tuple[Any, ...]], inputs: Sequence[Tensor]) -> None:
        self._function = function  # what it reads besides must not be freed
        self._inputs = [t.clone() for t in inputs]
        self._alike = [[i for i, t in enumerate(inputs) if t.dtype == kind] for kind in {t.dtype for t in inputs}]
        device = self._inputs[0].device
        with torch.cuda.device(device), torch.random.fork_rng(devices=[device]), torch.no_grad():
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM):
                    function(*self._inputs)
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=_pool(device)):
                self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """What the function gives."""
        for alike in self._alike:
            torch._foreach_copy_([self._inputs[i] for i in alike], [inputs[i] for i in alike])  # pyright: ignore[reportPrivateImportUsage]
        self._graph.replay()
        return tuple(None if t is None else t.clone() for t in self._outputs)


def _pool(device: torch.device) -> Any:
    """The memory of all graphs on a GPU: they run one after the other, and leave nothing there that is needed later.

    It goes with its last graph: the first one stays.
    """
    if device not in _FIRST:
        _FIRST[device] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(_FIRST[device]):
            torch.zeros(1, device=device)
    return _FIRST[device].pool()
