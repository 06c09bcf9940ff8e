"""Client-stacked E-steps: a window of the cohort is one tensor program, by torch.func.vmap.

For tiny models, whose loop spends its time in calls and not in arithmetic. The sum is that of `Sequential` up to
rounding: matrix products of a stack, and sums over it, add in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedprior import stack
from fedprior.core import Stats
from fedprior.engines.sequential import summed

WORK, LEAST = 1_000_000, 8
"""Parameters times examples a step above which, and clients below which, calls are not what takes the time."""


@dataclass
class Stacked:
    """Many clients at once; for what cannot be stacked, a ValueError that says why.

    Attributes:
        window: clients in a stack; memory is as many models, their gradients and their batches.
    """

    window: int = 128
    _store: Any = field(default=None, repr=False)  # of the run that is known to be stackable

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    def map_sum(self, work: Any, indices: Sequence[int]) -> Stats | None:
        """The sum of the clients' statistics, window by window."""
        if self._store is not work.store:
            if reason := stack.why_not(work, work.population[0]):
                raise ValueError(f"engines.Stacked cannot run {work.algorithm.name}: {reason}. Write engine=Auto()")
            self._store = work.store
        return self.windows(work, indices)

    def windows(self, work: Any, indices: Sequence[int]) -> Stats | None:
        """`map_sum` of what is known to be stackable."""
        total: Stats | None = None
        for start in range(0, len(indices), self.window):
            part = indices[start : start + self.window]
            try:
                uploads, stats = stack.uploads(work, part)
                stats = summed(work, uploads) if stats is None else stats
            except Exception as error:
                error.add_note(f"in round {work.number}, clients {part[0]} to {part[-1]}, seed {work.seed}")
                raise
            if stats is not None:
                total = stats if total is None else total + stats
        return total

    def close(self) -> None:
        """The next run is looked at anew."""
        self._store = None


def worth(work: Any, cohort: int) -> str:
    """Is stacking possible, and faster? Why, in words; empty if not. The same for all rounds of equal runs."""
    first = work.population[0]
    batch = min(getattr(work.algorithm.inference, "batch_size", None) or len(first.train), len(first.train))
    size = batch * work.objective.count(work.objective.params())
    if cohort < LEAST or size > WORK or stack.why_not(work, first):
        return ""
    return f"stacked: {cohort} clients, and {size:,} parameters times examples a step are few"
