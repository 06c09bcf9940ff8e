"""A budget of bytes: when it is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedprior.records import Round

_GROWTH = 1.05


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may spend.

    Attributes:
        mb: 10^6 bytes, both directions, all rounds.
        value_types: of the codec, to be tried in this order when a density is planned.
    """

    mb: float
    value_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.mb < math.inf:
            raise ValueError(f"budget_mb must be a positive number of megabytes, got {self.mb}")

    def spent(self, history: Sequence[Round], cohort: int) -> bool:
        """Might one more round exceed it, if all of its clients answer with payloads 5 % longer than the last ones?"""
        so_far = sum(r.bytes_down + r.bytes_up for r in history)
        return so_far + _GROWTH * cohort * (_last(history, "bytes_down") + _last(history, "bytes_up")) > self.mb * 1e6


def _last(history: Sequence[Round], direction: str) -> int:
    """The longest payload of the last round that has one: in some rounds nobody answers."""
    longest = (max((getattr(c, direction) for c in r.clients), default=0) for r in reversed(history))
    return next((length for length in longest if length), 0)
