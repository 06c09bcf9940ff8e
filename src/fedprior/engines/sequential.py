"""The reference engine: one client after the other. It defines what a round means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fedprior.core import Stats, Work
from fedprior.layer import LAYERS


@dataclass(frozen=True)
class Sequential:
    """One process, one client at a time.

    Attributes:
        threads: PyTorch's threads while clients train; None leaves them as they are.
    """

    threads: int | None = None
    layers = LAYERS

    def map_sum(self, work: Work, indices: Sequence[int]) -> Stats | None:
        """The sum of the clients' statistics in the order of `indices`."""
        return summed(work, self.uploads(work, indices))

    def uploads(self, work: Work, indices: Sequence[int]) -> Iterator[Any]:
        """What the clients send, one after the other."""
        for index in indices:
            with torch_threads(self.threads):
                upload = work.client(index)
            yield upload


def summed(work: Work, uploads: Iterable[Any]) -> Stats | None:
    """The sum of what was received, in the order of `uploads`: all engines add alike."""
    total: Stats | None = None
    for upload in uploads:
        stats = work.receive(upload)
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
