"""Accuracy against bytes and against parameters: FedSparse and its rivals in one harness.

    python benchmarks/pareto.py run --out pareto                          # all runs; goes on where it stopped
    python benchmarks/pareto.py run --out pareto --only "fedsparse 5 %" --seeds 0
    python benchmarks/pareto.py table --out pareto                        # tables and plots of what has been run

Setting "fashion": LeNet 20-50-500 on Fashion-MNIST, 100 clients, Dirichlet(1.0), cohort 10, one local epoch, batch
20, 100 rounds; "skewed" is the same with Dirichlet(0.1); "shakespeare" a GRU over the speaking roles of the plays.
A seed draws the partition, the initial model, the cohorts and all that the algorithms draw. Each run is a process of
its own with one thread. Bytes are lengths of payloads, both directions; MB are 10^6 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import fedprior as fp

PRUNED = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share, and the rivals in it."""

    clients: Callable[[int], tuple[fp.Population, fp.Examples]]
    model: Callable[..., torch.nn.Module]
    cohort: int
    lr: float
    runs: Mapping[str, Run]


@dataclass(frozen=True)
class Run:
    """One line of a table: an algorithm, for a learning rate, and the arguments of the model."""

    algorithm: Callable[[float], fp.Algorithm]
    model: Mapping[str, object]


def hand_sized(c1: int, c2: int, hidden: int) -> Run:
    return Run(lambda lr: fp.fedavg(lr), {"channels": (c1, c2), "hidden": hidden})


def whole(algorithm: Callable[..., fp.Algorithm], **arguments: object) -> Run:
    return Run(lambda lr: algorithm(**{"lr": lr, **arguments}), {})


LENET: Mapping[str, Run] = {
    "fedavg": whole(fp.fedavg),
    "fedavg int8": whole(fp.fedavg, value_type="int8", entropy="zlib"),
    "fedavg int4": whole(fp.fedavg, value_type="int4", entropy="zlib"),
    "top-k 1 %": whole(fp.topk, fraction=0.01),
    "top-k 10 %": whole(fp.topk, fraction=0.1),
    "dropout 0.5": whole(fp.feddropout, rate=0.5),
    "dropout 0.75": whole(fp.feddropout, rate=0.75),
    "group lasso": whole(fp.grouplasso),
    "dense 10-24-60": hand_sized(10, 24, 60),
    "dense 12-28-26": hand_sized(12, 28, 26),
    "dense 6-12-16": hand_sized(6, 12, 16),
    "fedsparse 5 %": whole(fp.fedsparse, density=0.05),
    "fedsparse 2 %": whole(fp.fedsparse, density=0.02),
    "fedsparse 10 %": whole(fp.fedsparse, density=0.1),
    "fedsparse 5 % int8": whole(fp.fedsparse, density=0.05, value_type="int8", entropy="zlib"),
    "fedsparse 5 % int4": whole(fp.fedsparse, density=0.05, value_type="int4", entropy="zlib"),
    "fedsparse 2 % int4": whole(fp.fedsparse, density=0.02, value_type="int4", entropy="zlib"),
    "fedsparse, gates": whole(fp.fedsparse, lambda_0=0.01),
}
