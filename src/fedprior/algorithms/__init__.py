"""The named algorithms, each one line over its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedprior.algorithm import Algorithm
from fedprior.algorithms.averaging import fedadagrad, fedadam, fedavg, fedavgm, fedprox, fedyogi
from fedprior.algorithms.smaller import feddropout, fedsparse, grouplasso, topk

ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    f.__name__: f
    for f in (fedavg, fedprox, fedavgm, fedadagrad, fedadam, fedyogi, fedsparse, feddropout, grouplasso, topk)
}

__all__ = [
    "ALGORITHMS",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "feddropout",
    "fedprox",
    "fedsparse",
    "fedyogi",
    "grouplasso",
    "topk",
]
