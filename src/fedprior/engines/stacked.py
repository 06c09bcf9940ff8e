"""Client-stacked E-steps: a window of the cohort is one tensor program, by torch.func.vmap.

For tiny models, whose loop spends its time in calls and not in arithmetic; on a GPU, which a single client leaves idle,
for all that fit. The sum is that of `Sequential` up to rounding: matrix products of a stack, and sums over it, add in
another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedprior import stack
from fedprior.core import Examples, Stats
from fedprior.engines.sequential import summed

WORK, LEAST = 1_000_000, 8
SAVED, PARAMETERS = 8, 4
"""Parameters times examples a step above which, and clients below which, calls are not what takes a CPU's time;
bytes that a client takes on a GPU per byte that its backward pass reads, and per byte of its parameters."""


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


def worth(work: Any, cohort: int) -> tuple[int, str]:
    """Clients to be stacked at once, and why, in words; (0, "") if that is impossible or not faster.

    The same for all rounds of equal runs.
    """
    first = work.population[0]
    batch = min(getattr(work.algorithm.inference, "batch_size", None) or len(first.train), len(first.train))
    size = batch * work.objective.count(work.objective.params())
    gpu = torch.device(work.device).type == "cuda"
    if cohort < (2 if gpu else LEAST) or (size > WORK and not gpu) or stack.why_not(work, first):
        return 0, ""
    if not gpu:
        return Stacked.window, f"stacked: {cohort} clients, and {size:,} parameters times examples a step are few"
    window = min(Stacked.window, _fitting(work, first.train.take(torch.arange(batch)).to(work.device)))
    return (window, f"stacked: {window} clients fit into a GPU at once") if window > 1 else (0, "")


def _fitting(work: Any, batch: Examples) -> int:
    """Clients whose stack takes a quarter of a GPU's memory: gradients' and libraries' share is an estimate."""
    saved = 0

    def pack(value: Tensor) -> Tensor:
        nonlocal saved
        saved += value.nbytes
        return value

    phi = {k: v.requires_grad_(k in work.objective.trainable) for k, v in work.objective.params().items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        work.objective.log_lik(phi, batch.x, batch.y)
    each = SAVED * saved + PARAMETERS * sum(v.nbytes for v in phi.values())
    return torch.cuda.get_device_properties(batch.x.device).total_memory // (4 * each)
