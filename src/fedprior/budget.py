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

    def spent(self, history: Sequence[Round], cohort: int, ahead: int = 1) -> bool:
        """Might `ahead` more rounds, with payloads 5 % longer than the longest of the last one, exceed it?"""
        if not history:
            return False
        clients = history[-1].clients
        longest = max(c.bytes_down for c in clients) + max(c.bytes_up for c in clients)
        so_far = sum(r.bytes_down + r.bytes_up for r in history)
        return so_far + ahead * _GROWTH * cohort * longest > self.mb * 1e6
