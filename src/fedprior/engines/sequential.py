"""The reference engine: one client after the other. It defines what a round means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fedprior.core import Stats, Work


@dataclass(frozen=True)
class Sequential:
    """One process, one client at a time.

    Attributes:
        threads: PyTorch's threads while clients train; None leaves them as they are.
    """

    threads: int | None = None

    def map_sum(self, work: Work, indices: Sequence[int]) -> Stats | None:
        """The sum of the clients' statistics in the order of `indices`."""
        total: Stats | None = None
        with torch_threads(self.threads):
            for index in indices:
                stats = work.receive(work.client(index))
                if stats is not None:
                    total = stats if total is None else total + stats
        return total


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """PyTorch's thread count, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
