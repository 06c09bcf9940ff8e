"""The default engine: stacked clients, the plain loop or worker processes, whichever is faster here.

Tiny models are stacked (stacked.py), and on a GPU all that can be, by a rule that knows sizes alone: that a sum is
added in another order shows in its last bits, and equal runs, also resumed ones, shall have equal bits.

The loop and the workers do a client with one thread and the same operations, so that the choice between them, which
rests on times, changes no bit of the result. The first two clients run in the loop, and the second one is timed;
processes are forked if a round would keep the loop busy for longer than `WORTH` seconds, or, later on, has done so. On
a GPU, what cannot be stacked goes through the loop, as on one core and for a cohort of one client, with PyTorch's
threads as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedprior.core import Stats, Work
from fedprior.engines.sequential import Sequential, summed
from fedprior.engines.stacked import Stacked, worth
from fedprior.engines.workers import Workers, cores
from fedprior.layer import LAYERS

WORTH = 0.05


@dataclass
class Auto:
    """Look at the sizes, else measure on the first clients; then stay with the faster engine.

    Attributes:
        choice: what was chosen and why, in words; empty until it is known.
    """

    choice: str = ""
    _workers: Workers = field(default_factory=Workers, repr=False)
    _window: int = field(default=0, repr=False)  # clients to stack at once; 0: none
    _store: Any = field(default=None, repr=False)  # of the run for which the choice was made
    layers = LAYERS

    def map_sum(self, work: Work, indices: Sequence[int]) -> Stats | None:
        """The sum of the clients' statistics in the order of `indices`."""
        if self._store is not work.store:
            (self._window, self.choice), self._store = worth(work, len(indices)), work.store
        if self._window:
            return Stacked(self._window).windows(work, indices)
        if self.choice.startswith("workers"):
            return self._workers.map_sum(work, indices)
        return summed(work, self._uploads(work, indices))

    def _uploads(self, work: Work, indices: Sequence[int]) -> Iterator[Any]:
        if self.choice:
            return self._watched(work, indices)
        if len(indices) < 2 or cores() < 2 or not Workers.usable(getattr(work, "device", "cpu")):
            return Sequential().uploads(work, indices)
        return self._calibrate(work, indices)

    def _calibrate(self, work: Work, indices: Sequence[int]) -> Iterator[Any]:
        """Two clients in the loop, of which the second is timed: the first one warms up. Then the rest.

        Clients that drop out take no time, and tell nothing.
        """
        loop, warm = Sequential(threads=1), False
        for done, index in enumerate(indices, start=1):
            started = time.perf_counter()
            upload = next(loop.uploads(work, [index]))
            each = time.perf_counter() - started
            yield upload
            if warm and upload.seconds:
                self._choose(each, len(indices))
                rest = indices[done:]
                workers = self.choice.startswith("workers")
                yield from self._workers.uploads(work, rest) if workers else self._watched(work, rest)
                return
            warm = warm or upload.seconds > 0

    def _watched(self, work: Work, indices: Sequence[int]) -> Iterator[Any]:
        """The loop, as long as rounds are short: the client that was timed may have been a small one."""
        busy = 0.0
        for upload in Sequential(threads=1).uploads(work, indices):
            busy += upload.seconds + upload.seconds_wire
            yield upload
        if busy > WORTH:
            self._choose(busy / len(indices), len(indices))

    def _choose(self, each: float, clients: int) -> None:
        workers = each * clients > WORTH
        name = f"workers, {cores()} processes" if workers else "loop"
        self.choice = f"{name}: a client takes {1000 * each:.1f} ms in the loop"

    def close(self) -> None:
        """End the processes; the next run is measured anew."""
        self._workers.close()
        self._store = None
