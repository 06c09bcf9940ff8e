"""Who takes part in a round, and who answers in time (simulated)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedprior.rng import numpy_generator


@dataclass(frozen=True)
class Availability:
    """A simulated fleet: clients that drop out, and clients too slow for the round's deadline.

    A client needs (training examples) * seconds_per_example * exp(slowness * g) seconds, g ~ N(0, 1) drawn
    once per client: a slow device is slow in every round.

    Attributes:
        dropout: probability that a sampled client never answers. Under secure sums it falls silent at one of their
            stages before the upload, each as likely, and after it, at the last stage, with a third of the probability.
        deadline_seconds: simulated seconds after which an answer is refused; None waits for all.
        seconds_per_example: of the median device.
        slowness: standard deviation of the logarithm of a device's time.
    """

    dropout: float = 0.0
    deadline_seconds: float | None = None
    seconds_per_example: float = 0.01
    slowness: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability below 1, got {self.dropout}")
        if self.deadline_seconds is not None and self.deadline_seconds <= 0:
            raise ValueError(f"deadline_seconds must be positive, got {self.deadline_seconds}")
        if self.seconds_per_example < 0 or self.slowness < 0:
            raise ValueError("seconds_per_example and slowness must not be negative")

    def status(self, seed: int, number: int, index: int, examples: int) -> Literal["ok", "dropped", "late"]:
        """What becomes of a client in round `number`."""
        if self.dropout and numpy_generator(seed, number, index, "dropout").random() < self.dropout:
            return "dropped"
        if self.deadline_seconds is None:
            return "ok"
        g = numpy_generator(seed, index, "device").standard_normal()
        seconds = examples * self.seconds_per_example * math.exp(self.slowness * g)
        return "late" if seconds > self.deadline_seconds else "ok"

    def stage(self, seed: int, number: int, index: int, status: str) -> str:
        """At which message of a secure sum (privacy/secure.py) a client of this `status` stops; "" for none."""
        rng = numpy_generator(seed, number, index, "stage")
        if status == "dropped":
            return ("keys", "shares", "masked")[int(rng.integers(3))]
        return "reveal" if status == "ok" and self.dropout and rng.random() < self.dropout / 3 else ""


def sample(seed: int, number: int, population: int, cohort: int, poisson: bool = False) -> list[int]:
    """The indices of the clients of round `number`, ascending: `cohort` of them without replacement.

    With `poisson` each client is chosen by itself, with probability cohort / population; their number is not fixed.
    """
    if poisson:
        chosen = numpy_generator(seed, number, "cohort").random(population) < cohort / population
        return [int(i) for i in chosen.nonzero()[0]]
    if cohort == population:
        return list(range(population))
    chosen = numpy_generator(seed, number, "cohort").choice(population, cohort, replace=False)
    return sorted(int(i) for i in chosen)
