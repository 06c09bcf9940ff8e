"""The named algorithms, each one line over its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedprior import inference, priors, server
from fedprior.algorithm import Algorithm, Weighting
from fedprior.codecs import Sparse


def fedavg(
    lr: float = 0.05, epochs: int = 1, batch_size: int | None = 20, weighting: Weighting = "examples"
) -> Algorithm:
    """McMahan et al. 2017, arXiv:1602.05629: a flat Gaussian prior, hard EM, a truncated E-step."""
    e_step = inference.Point(lr, epochs, batch_size)
    return Algorithm(priors.Gaussian(), e_step, weighting=weighting, name="fedavg")


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


def fedsparse(
    lr: float = 0.05,
    lambda_0: float = 0.01,
    gate_lr: float = 0.05,
    precision: float = 0.0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "uniform",
) -> Algorithm:
    """Louizos et al. 2021, arXiv:2111.10192: a spike-and-slab prior with a gate per unit."""
    e_step = inference.Gated(lr, epochs, batch_size, gate_lr)
    return Algorithm(
        priors.SpikeSlab(lambda_0, precision), e_step, codec=Sparse(), weighting=weighting, name="fedsparse"
    )


def feddropout(
    lr: float = 0.05,
    rate: float = 0.5,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Caldas et al. 2018, arXiv:1812.07210: every client has a random part of the model, 1 - rate of each layer."""
    e_step = inference.Point(lr, epochs, batch_size)
    return Algorithm(priors.Dropout(rate), e_step, codec=Sparse(), weighting=weighting, name="feddropout")


ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    f.__name__: f for f in (fedavg, fedprox, fedavgm, fedadagrad, fedadam, fedyogi, fedsparse, feddropout)
}
