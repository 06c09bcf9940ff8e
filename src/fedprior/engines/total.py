"""A sum of statistics as one vector, for engines whose clients are added in several places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedprior import wire
from fedprior.core import Stats

Layout = list[list[Any]]
"""[["term/name", shape, dtype], ...], as JSON has it."""


@dataclass
class Total:
    """A sum of `clients` in float64, which is rounded once, at the end.

    Of float32 values the sum is exact as long as none is more than 2^29 / (number of values) times smaller than another
    one of its entry: then it does not depend on their order, nor on how they are dealt to several totals.
    """

    layout: Layout = field(default_factory=list)
    clients: float = 0.0
    values: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, stats: Stats) -> None:
        """One more."""
        flat = wire.flat(stats)
        layout = [[key, list(v.shape), str(v.dtype).removeprefix("torch.")] for key, v in flat.items()]
        values = torch.cat([v.reshape(-1) for v in flat.values()])
        check_same([self.layout or layout, layout])
        self.values = self.values + values if self.layout else values.double()
        self.layout = layout
        self.clients += stats.clients


def check_same(layouts: Sequence[Layout]) -> None:
    """A ValueError unless all are the same."""
    for layout in layouts:
        if layout != layouts[0]:
            raise ValueError(f"cannot add statistics {layout} to {layouts[0]}")


def zeros(layout: Layout, device: str) -> Tensor:
    """The values of no client."""
    return torch.zeros(sum(torch.Size(shape).numel() for _, shape, _ in layout), dtype=torch.float64, device=device)


def rounded(values: Tensor, layout: Layout, clients: float) -> Stats:
    """The statistics, in the types that they had."""
    pieces = zip(layout, values.split([torch.Size(shape).numel() for _, shape, _ in layout]), strict=True)
    return wire.unflat({key: v.view(shape).to(getattr(torch, dtype)) for (key, shape, dtype), v in pieces}, clients)
