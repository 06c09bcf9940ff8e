"""The named algorithms, each one line over its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedprior.algorithm import Algorithm
from fedprior.algorithms.averaging import fedadagrad, fedadam, fedavg, fedavgm, fedprox, fedyogi
from fedprior.algorithms.bayesian import (
    feddyn,
    fedep,
    fedhb,
    fedpa,
    fedsep,
    fola,
    horseshoe,
    laplace,
    learnedscale,
    pvi,
    scaffold,
)
from fedprior.algorithms.smaller import feddropout, fedsparse, grouplasso, topk

ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    f.__name__: f
    for f in (
        *(fedavg, fedprox, fedavgm, fedadagrad, fedadam, fedyogi, fedsparse, feddropout, grouplasso, topk),
        *(scaffold, feddyn, fola, fedhb, learnedscale, laplace, horseshoe, fedpa, pvi, fedep, fedsep),
    )
}

__all__ = [
    "ALGORITHMS",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "feddropout",
    "feddyn",
    "fedep",
    "fedhb",
    "fedpa",
    "fedprox",
    "fedsep",
    "fedsparse",
    "fedyogi",
    "fola",
    "grouplasso",
    "horseshoe",
    "laplace",
    "learnedscale",
    "pvi",
    "scaffold",
    "topk",
]
