"""The default engine: the plain loop or worker processes, whichever is faster here.

Both do a client with one thread and the same operations, so that the choice, which rests on times, changes no bit of
the result. The first two clients run in the loop, and the second one is timed; processes are forked if a round would
keep the loop busy for longer than `WORTH` seconds. On a GPU, on one core and for a cohort of one client there is only
the loop, with PyTorch's threads as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedprior.core import Stats, Work
from fedprior.engines.sequential import Sequential, summed
from fedprior.engines.workers import Workers, cores

WORTH = 0.05


@dataclass
class Auto:
    """Measure on the first clients, then stay with the faster engine.

    Attributes:
        choice: what was chosen and why, in words; empty until it is known.
    """

    choice: str = ""
    _workers: Workers = field(default_factory=Workers, repr=False)

    def map_sum(self, work: Work, indices: Sequence[int]) -> Stats | None:
        """The sum of the clients' statistics in the order of `indices`."""
        return summed(work, self._uploads(work, indices))

    def _uploads(self, work: Work, indices: Sequence[int]) -> Iterator[Any]:
        if self.choice.startswith("workers"):
            return self._workers.uploads(work, indices)
        if self.choice:
            return Sequential(threads=1).uploads(work, indices)
        if len(indices) < 2 or cores() < 2 or not Workers.usable(getattr(work, "device", "cpu")):
            return Sequential().uploads(work, indices)
        return self._calibrate(work, indices)

    def _calibrate(self, work: Work, indices: Sequence[int]) -> Iterator[Any]:
        """Two clients in the loop, of which the second is timed: the first one warms up. Then the rest."""
        loop = Sequential(threads=1)
        yield from loop.uploads(work, indices[:1])
        started = time.perf_counter()
        second = next(loop.uploads(work, indices[1:2]))
        each = time.perf_counter() - started
        yield second
        workers = each * len(indices) > WORTH
        with_them = f"workers, {cores()} processes" if workers else "loop"
        self.choice = f"{with_them}: a client takes {1000 * each:.1f} ms in the loop"
        yield from (self._workers if workers else loop).uploads(work, indices[2:])

    def close(self) -> None:
        """End the processes."""
        self._workers.close()
