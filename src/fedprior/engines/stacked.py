"""Client-stacked E-steps: a window of the cohort is one tensor program, by torch.func.vmap.

For tiny models, whose loop spends its time in calls and not in arithmetic. The sum is that of `Sequential` up to
rounding: matrix products of a stack, and sums over it, add in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedprior import stack
from fedprior.core import Stats

WORK = 1_000_000
"""Parameters times examples a step, above which arithmetic and not calls takes the time: measured on 2 cores."""


@dataclass(frozen=True)
class Stacked:
    """Many clients at once; for what cannot be stacked, a ValueError that says why.

    Attributes:
        window: clients in a stack; memory is as many models, their gradients and their batches.
    """

    window: int = 128

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    def map_sum(self, work: Any, indices: Sequence[int]) -> Stats | None:
        """The sum of the clients' statistics, window by window."""
        if reason := stack.why_not(work, work.population[indices[0]]):
            raise ValueError(f"engines.Stacked cannot run {work.algorithm.name}: {reason}. Write engine=Auto()")
        return self.windows(work, indices)

    def windows(self, work: Any, indices: Sequence[int]) -> Stats | None:
        """`map_sum` of what is known to be stackable."""
        total: Stats | None = None
        for start in range(0, len(indices), self.window):
            part = indices[start : start + self.window]
            try:
                uploads = stack.uploads(work, part)
            except Exception as error:
                error.add_note(f"in round {work.number}, clients {part[0]} to {part[-1]}, seed {work.seed}")
                raise
            stats = stack.received(work, uploads)
            if stats is not None:
                total = stats if total is None else total + stats
        return total


def worth(work: Any, indices: Sequence[int]) -> bool:
    """Is stacking possible, and faster? A rule that rests on sizes, not on times: equal runs have equal bits."""
    first = work.population[indices[0]]
    batch = min(getattr(work.algorithm.inference, "batch_size", None) or len(first.train), len(first.train))
    parameters = work.objective.count(work.objective.params())
    return len(indices) >= 8 and batch * parameters <= WORK and not stack.why_not(work, first)
