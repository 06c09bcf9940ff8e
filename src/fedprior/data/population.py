"""Lazy populations: clients that are gathered, or made, when they are asked for.

A `Partition` is one vector of positions into shared examples, client after client (as in a sparse
matrix in CSR form): 8 bytes an example and 8 a client, and no Python object for either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import index as as_int
from typing import Any

import torch
from torch import Tensor

from fedprior.core import Client, Examples, Gathered


@dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """Examples dealt out to clients. Made by `iid`, `dirichlet`, `shards` and `by_key`.

    Attributes:
        examples: all the examples, shared by the clients.
        index: positions in `examples`, client after client, shape (examples dealt,), int64.
        offsets: client i has index[offsets[i] : offsets[i + 1]], shape (clients + 1,), int64.
        holdout: the fraction of each client's examples, the last of its slice, that is held out.
        names: the clients' names, or None for "client-0", "client-1", ...
    """

    examples: Examples
    index: Tensor
    offsets: Tensor
    holdout: float = 0.0
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int, /) -> Client:
        i = _checked(index, len(self))
        mine = self.index[self.offsets[i] : self.offsets[i + 1]]
        train = len(mine) - self._held(len(mine))
        held_out = self.examples.take(mine[train:]) if train < len(mine) else None
        return Client(i, self.name(i), self.examples.take(mine[:train]), held_out)

    def gather(self, indices: Sequence[int]) -> Gathered:
        """The training examples of several clients: where they are."""
        count = len(self)
        own = [_checked(i, count) for i in indices]
        starts, ends = self.offsets[torch.tensor([own, [i + 1 for i in own]])]
        sizes = [size - self._held(size) for size in (ends - starts).tolist()]
        each = torch.tensor(sizes)
        shift = (starts - each.cumsum(0) + each).repeat_interleave(each)
        where = self.index[shift + torch.arange(len(shift))]
        return Gathered(own, [self._name(i) for i in own], self.examples, where, sizes)

    def __iter__(self) -> Iterator[Client]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        sizes = self.offsets.diff()
        spread = f", {int(sizes.min())} to {int(sizes.max())} each" if len(self) else ""
        return f"Partition({len(self)} clients, {len(self.index)} examples{spread})"

    def name(self, index: int) -> str:
        """The name of a client, without gathering its examples."""
        return self._name(_checked(index, len(self)))

    def _name(self, i: int) -> str:
        return f"client-{i}" if self.names is None else self.names[i]

    def size(self, index: int) -> int:
        """The number of training examples of a client, without gathering them."""
        i = _checked(index, len(self))
        size = int(self.offsets[i + 1] - self.offsets[i])
        return size - self._held(size)

    def label_counts(self) -> Tensor:
        """Examples, held-out ones too, by client and label: (clients, largest label + 1), int64."""
        labels = self.examples.y.cpu()[self.index]
        classes = int(self.examples.y.max()) + 1
        owner = torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())
        counts = torch.bincount(owner * classes + labels, minlength=len(self) * classes)
        return counts.reshape(len(self), classes)

    def fingerprint(self) -> str:
        """A digest of who has which examples."""
        digest = hashlib.sha256(f"{self.holdout} {self.names}".encode())
        for tensor in (self.index, self.offsets):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _held(self, size: int) -> int:
        # a client always keeps an example to train on
        return min(round(self.holdout * size), max(size - 1, 0))


@dataclass(frozen=True)
class LazyPopulation:
    """`count` clients, of which client i is `make(i)`: from files, a simulator, anywhere."""

    count: int
    make: Callable[[int], Client]

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a population needs at least 1 client, got count={self.count}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Client:
        i = _checked(index, self.count)
        client = self.make(i)
        if not isinstance(client, Client):
            raise TypeError(f"make({i}) must return a fedprior Client, got {type(client).__name__}")
        if client.index != i:
            raise ValueError(
                f"make({i}) returned a client with index {client.index}; "
                f"write Client(index={i}, ...), since a client's index seeds its randomness"
            )
        return client


def paired(train: Partition, test: Partition) -> LazyPopulation:
    """The clients of `train`, whose held-out examples are those of the same name in `test`.

    For data that comes with a split of its own, such as Shakespeare's: by time, where a random
    `holdout` would put overlapping windows on both sides.
    """
    place = {test.name(i): i for i in range(len(test))}
    missing = [name for i in range(len(train)) if (name := train.name(i)) not in place]
    if missing:
        raise ValueError(f"{len(missing)} clients have no test examples, the first is {missing[0]!r}")

    def make(i: int) -> Client:
        return replace(train[i], held_out=test[place[train.name(i)]].train)

    return LazyPopulation(len(train), make)


def autoencoding(source: Any) -> Any:
    """The same examples with their inputs as targets, for loss="autoencoder": x (n, ...), y (n, inputs).

    Args:
        source: Examples, or a population of clients, which may have been dealt out by label.
    """
    if isinstance(source, Examples):
        return Examples(source.x, source.x.flatten(1), source.keys)
    if isinstance(source, Partition):
        return replace(source, examples=autoencoding(source.examples))

    def make(i: int) -> Client:
        client = source[i]
        held = None if client.held_out is None else autoencoding(client.held_out)
        return replace(client, train=autoencoding(client.train), held_out=held)

    return LazyPopulation(len(source), make)


def _checked(index: int, count: int) -> int:
    i = as_int(index)
    if not -count <= i < count:
        raise IndexError(f"client {i} of a population of {count}")
    return i % count
