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
from fedprior.algorithms.distilled import apqn, decoupled, fedppd, kure, mqat, pfedbred
from fedprior.algorithms.mixtures import fedem, fedhbmixture, fedsparsemixture, ifca
from fedprior.algorithms.personal import ditto, fedbn, fedper, fedpop, fedrep, local, pfedbayes, pfedme, pfedvem
from fedprior.algorithms.rules import fednsl
from fedprior.algorithms.smaller import feddropout, fedsparse, grouplasso, topk

_AVERAGING = (fedavg, fedprox, fedavgm, fedadagrad, fedadam, fedyogi)
_SMALLER = (fedsparse, feddropout, grouplasso, topk)
_BAYESIAN = (scaffold, feddyn, fola, fedhb, learnedscale, laplace, horseshoe, fedpa, pvi, fedep, fedsep)
_PERSONAL = (local, fedper, fedrep, fedbn, pfedme, ditto, pfedbayes, pfedvem, fedpop)
_DISTILLED = (pfedbred, fedppd, kure, apqn, mqat, decoupled)
_MIXTURES = (fedem, ifca, fedhbmixture, fedsparsemixture)
_RULES = (fednsl,)
ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    f.__name__: f for f in _AVERAGING + _SMALLER + _PERSONAL + _BAYESIAN + _DISTILLED + _MIXTURES + _RULES
}

__all__ = [
    "ALGORITHMS",
    "apqn",
    "decoupled",
    "ditto",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedbn",
    "feddropout",
    "feddyn",
    "fedem",
    "fedep",
    "fedhb",
    "fedhbmixture",
    "fednsl",
    "fedpa",
    "fedper",
    "fedpop",
    "fedppd",
    "fedprox",
    "fedrep",
    "fedsep",
    "fedsparse",
    "fedsparsemixture",
    "fedyogi",
    "fola",
    "grouplasso",
    "horseshoe",
    "ifca",
    "kure",
    "laplace",
    "learnedscale",
    "local",
    "mqat",
    "pfedbayes",
    "pfedbred",
    "pfedme",
    "pfedvem",
    "pvi",
    "scaffold",
    "topk",
]
