r"""The mean over clients of a vector that each of them keeps, from sums of changes alone.

    seen' = seen + sum_s new_s            m' = (seen m + sum_s step_s) / seen'

A client's first step is its vector, and new_s = 1; later ones are differences, and new_s = 0. So m is the mean over the
clients that have taken part so far, those that are not in the round included, and nobody asks how many there are.
"""

from __future__ import annotations

from fedprior import tree
from fedprior.core import Params, Stats


def joined(mean: Params, seen: Params, t: Stats) -> tuple[Params, Params]:
    """The new mean and the new count, from the terms `step` and `new` of t."""
    after = {"clients": seen["clients"] + t["new"]["clients"]}
    counts = seen["clients"], after["clients"].clamp(min=1e-9)  # nobody at all: 0 stays 0
    return tree.map(lambda m, step: (counts[0] * m + step) / counts[1], mean, t["step"]), after
