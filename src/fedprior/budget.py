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

    def spent(self, history: Sequence[Round], cohort: int, down: float | None = None, up: float | None = None) -> bool:
        """Might one more round exceed it, if all of its clients answer?

        Args:
            history: the rounds so far; a run that has none has not spent anything.
            cohort: clients a round.
            down: bytes of the next broadcast; None if they are not known: 5 % more than the longest of the last ones.
            up: the most bytes that a client can send; None as for `down`.
        """
        so_far = sum(r.bytes_down + r.bytes_up for r in history)
        grown_down, grown_up = (_GROWTH * _last(history, d) for d in ("bytes_down", "bytes_up"))
        down = grown_down if down is None else down
        up = grown_up if up is None else up
        return bool(history) and so_far + cohort * (down + up) > self.mb * 1e6


def _last(history: Sequence[Round], direction: str) -> int:
    """The longest payload of the last round that has one: in some rounds nobody answers."""
    longest = (max((getattr(c, direction) for c in r.clients), default=0) for r in reversed(history))
    return next((length for length in longest if length), 0)
