"""What clients cost: the seconds of their last E-step, for who comes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MOST = 100_000


@dataclass
class Costs:
    """Measured seconds by position in the population, of the clients seen last; one that is not here is a dear one."""

    seconds: dict[int, float] = field(default_factory=dict)

    def saw(self, index: int, seconds: float) -> None:
        """Remember."""
        self.seconds.pop(index, None)
        self.seconds[index] = seconds
        if len(self.seconds) > MOST:
            del self.seconds[next(iter(self.seconds))]

    def longest_first(self, indices: Sequence[int]) -> list[int]:
        """The dearest first; equal ones, and those never seen, in their order."""
        return sorted(indices, key=lambda i: -self.seconds.get(i, float("inf")))

    def dealt(self, indices: Sequence[int], shares: int) -> list[list[int]]:
        """The clients in shares that cost about the same, each in the order of `indices`.

        The dearest first, each to the share that is least. One never seen is as dear as the dearest of the others.
        """
        dearest = max((self.seconds[i] for i in indices if i in self.seconds), default=1.0)
        sums, owner = [0.0] * shares, dict[int, int]()
        for index in self.longest_first(indices):
            owner[index] = sums.index(min(sums))
            sums[owner[index]] += self.seconds.get(index, dearest)
        return [[i for i in indices if owner[i] == share] for share in range(shares)]
