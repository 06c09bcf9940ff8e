"""Federated learning in which the prior is the algorithm."""

from fedprior import codecs, data, engines, inference, metrics, models, posteriors, priors, server, tree
from fedprior.algorithm import Algorithm
from fedprior.algorithms import (
    ALGORITHMS,
    ditto,
    fedadagrad,
    fedadam,
    fedavg,
    fedavgm,
    fedbn,
    feddropout,
    feddyn,
    fedep,
    fedhb,
    fedpa,
    fedper,
    fedprox,
    fedrep,
    fedsep,
    fedsparse,
    fedyogi,
    fola,
    grouplasso,
    horseshoe,
    laplace,
    learnedscale,
    local,
    pfedme,
    pvi,
    scaffold,
    topk,
)
from fedprior.cohort import Availability
from fedprior.core import Client, Examples, Params, Stats
from fedprior.export import export, load_slim
from fedprior.objective import Loss
from fedprior.pruning import prune
from fedprior.records import ClientRecord, Round
from fedprior.result import Result
from fedprior.run import run

__version__ = "0.1.0"

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Availability",
    "Client",
    "ClientRecord",
    "Examples",
    "Loss",
    "Params",
    "Result",
    "Round",
    "Stats",
    "codecs",
    "data",
    "ditto",
    "engines",
    "export",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedbn",
    "feddropout",
    "feddyn",
    "fedep",
    "fedhb",
    "fedpa",
    "fedper",
    "fedprox",
    "fedrep",
    "fedsep",
    "fedsparse",
    "fedyogi",
    "fola",
    "grouplasso",
    "horseshoe",
    "inference",
    "laplace",
    "learnedscale",
    "load_slim",
    "local",
    "metrics",
    "models",
    "pfedme",
    "posteriors",
    "priors",
    "prune",
    "pvi",
    "run",
    "scaffold",
    "server",
    "topk",
    "tree",
]
