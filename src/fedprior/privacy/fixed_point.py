r"""Fixed point: real vectors as integers whose sum over clients cannot wrap.

    word = round(scale x) + noise  mod 2^bits        |round(scale x)| <= limit, values beyond are cut off
    limit = floor((2^(bits-1) - 1) / (clients + ceil(12 nu)))
    scale = the largest power of two <= limit / bound

    paper    code      what it is
    bound    bound     the largest |x| of one client
    nu       spread    standard deviation of the noise of the whole sum, in bounds; 0 without noise

All clients at their bounds and noise of 12 standard deviations fit. Sums of words are exact, and as scales are powers
of two, what they stand for is the exact sum of the rounded values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

WIDTHS = {16: np.dtype("<u2"), 32: np.dtype("<u4"), 64: np.dtype("<u8")}
_COARSEST = 64


@dataclass(frozen=True)
class FixedPoint:
    """A ring of integers, and what one client may add to a sum.

    Attributes:
        bits: of a word: 16, 32 or 64.
        clients: the most that are summed.
        spread: nu.
    """

    bits: int
    clients: int
    spread: float = 0.0

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {self.bits!r}")
        if self.limit < _COARSEST:
            noise = f" under noise of {self.spread:.3g} bounds" if self.spread else ""
            raise ValueError(
                f"a sum of {self.clients} clients{noise} in {self.bits} bits leaves each client the integers up to "
                f"{self.limit}, and {_COARSEST} are the least: give more bits, or a smaller cohort"
            )

    @property
    def dtype(self) -> np.dtype:
        """Of a word, little-endian."""
        return WIDTHS[self.bits]

    @property
    def limit(self) -> int:
        """The largest integer of one client."""
        return (2 ** (self.bits - 1) - 1) // (self.clients + math.ceil(12 * self.spread))

    def scale(self, bound: float) -> float:
        """Steps per unit of x; at most 2^53 steps in all, which float64 can tell apart."""
        return 2.0 ** math.floor(math.log2(min(self.limit, 2**53) / bound))

    def integers(self, values: np.ndarray, bound: float) -> tuple[np.ndarray, int]:
        """round(scale x), int64, and how many values were cut off; x is finite."""
        steps = np.rint(values.astype(np.float64) * self.scale(bound))
        most = math.floor(self.scale(bound) * bound)
        return np.clip(steps, -most, most).astype(np.int64), int((np.abs(steps) > most).sum())

    def words(self, integers: np.ndarray) -> np.ndarray:
        """Mod 2^bits."""
        return integers.astype(np.uint64).astype(self.dtype)

    def values(self, words: np.ndarray, bound: float) -> np.ndarray:
        """What a sum of words stands for, float64."""
        signed = words.astype(self.dtype).view(f"<i{self.bits // 8}")
        return signed.astype(np.float64) / self.scale(bound)
