"""Averaging: FedAvg, with a pull to the average, and with other server steps."""

from __future__ import annotations

from fedprior import inference, priors, server, wire
from fedprior.algorithm import Algorithm, Weighting
from fedprior.codecs import Dense, Entropy, ValueType


def fedavg(
    lr: float = 0.05,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
    value_type: ValueType = "float32",
    entropy: Entropy = "none",
) -> Algorithm:
    """McMahan et al. 2017, arXiv:1602.05629: a flat Gaussian prior, hard EM, a truncated E-step.

    `value_type` and `entropy` are those of both directions (codecs.Dense), but broadcasts have 8 bits at least: with
    int4 or int2 the server sends int8 (wire.chain).
    """
    e_step, both = inference.Point(lr, epochs, batch_size), wire.chain(Dense(entropy=entropy), value_type)
    return Algorithm(priors.Gaussian(), e_step, weighting=weighting, name="fedavg", **both)


def fedprox(
    lr: float = 0.05,
    precision: float = 1.0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Li et al. 2020, arXiv:1812.06127: FedAvg with a pull; the paper's mu is precision / N_s."""
    e_step = inference.Point(lr, epochs, batch_size)
    return Algorithm(priors.Gaussian(precision), e_step, weighting=weighting, name="fedprox")


def fedavgm(
    lr: float = 0.05,
    server_lr: float = 1.0,
    momentum: float = 0.9,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Hsu et al. 2019, arXiv:1909.06335: momentum on the server."""
    e_step = inference.Point(lr, epochs, batch_size)
    step = server.Momentum(server_lr, momentum)
    return Algorithm(priors.Gaussian(), e_step, step, weighting=weighting, name="fedavgm")


def fedadagrad(
    lr: float = 0.05,
    server_lr: float = 0.1,
    tau: float = 1e-3,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Reddi et al. 2021, arXiv:2003.00295: Adagrad on the server."""
    e_step, step = inference.Point(lr, epochs, batch_size), server.Adagrad(server_lr, tau=tau)
    return Algorithm(priors.Gaussian(), e_step, step, weighting=weighting, name="fedadagrad")


def fedadam(
    lr: float = 0.05,
    server_lr: float = 0.01,
    tau: float = 1e-3,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Reddi et al. 2021, arXiv:2003.00295: Adam on the server."""
    e_step, step = inference.Point(lr, epochs, batch_size), server.Adam(server_lr, tau=tau)
    return Algorithm(priors.Gaussian(), e_step, step, weighting=weighting, name="fedadam")


def fedyogi(
    lr: float = 0.05,
    server_lr: float = 0.01,
    tau: float = 1e-3,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Reddi et al. 2021, arXiv:2003.00295: Yogi on the server."""
    e_step, step = inference.Point(lr, epochs, batch_size), server.Yogi(server_lr, tau=tau)
    return Algorithm(priors.Gaussian(), e_step, step, weighting=weighting, name="fedyogi")
