"""The named algorithms, each one line over its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedprior import inference, priors, server, wire
from fedprior.algorithm import Algorithm, Weighting
from fedprior.budget import Budget
from fedprior.codecs import Dense, Entropy, Sparse, TopK, ValueType


def fedavg(
    lr: float = 0.05,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
    value_type: ValueType = "float32",
    entropy: Entropy = "none",
) -> Algorithm:
    """McMahan et al. 2017, arXiv:1602.05629: a flat Gaussian prior, hard EM, a truncated E-step.

    `value_type` and `entropy` are those of both directions (codecs.Dense, wire.chain).
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


def fedsparse(
    lr: float = 0.2,
    density: float | None = None,
    budget_mb: float | None = None,
    lambda_0: float | None = None,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
    value_type: ValueType | None = None,
    entropy: Entropy = "zlib",
    momentum: float = 0.5,
    activations: float = 0.1,
    gate_lr: float = 0.05,
    precision: float = 0.0,
) -> Algorithm:
    """Louizos et al. 2021, arXiv:2111.10192: a spike-and-slab prior with a gate per unit, hence a smaller model.

    At most one of the three: `density`, which fraction of the parameters is left (0.05 if none is given);
    `budget_mb`, 10^6 bytes in both directions for all rounds, from which density and value type follow; `lambda_0`,
    the price of a parameter in nats, with gates that each client samples and learns by Adam with rate `gate_lr`.
    `momentum` is the server's, and `activations` what a share of them costs when a share of the parameters costs 1
    (priors.SharedGates): 0.5 gives a faster model than 0.1. Neither is used with `lambda_0`.
    """
    if sum(wish is not None for wish in (density, budget_mb, lambda_0)) > 1:
        raise ValueError(
            "density, budget_mb and lambda_0 each decide how small the model gets: give one of them, "
            f"got {density}, {budget_mb} and {lambda_0}"
        )
    value_types = (value_type,) if value_type else ("float32",) if budget_mb is None else ("int8", "int4")
    both = wire.chain(Sparse(entropy="none" if value_types[0] == "float32" else entropy), value_types[0])
    if lambda_0 is not None:
        slab, gated = priors.SpikeSlab(lambda_0, precision), inference.Gated(lr, epochs, batch_size, gate_lr)
        return Algorithm(slab, gated, weighting=weighting, name="fedsparse", **both)
    if density is None and budget_mb is None:
        density = 0.05
    return Algorithm(
        priors.SharedGates(density, precision=precision, activations=activations),
        inference.Gains(lr, epochs, batch_size),
        server.Momentum(1.0, momentum) if momentum else server.Exact(),
        weighting=weighting,
        budget=None if budget_mb is None else Budget(budget_mb, value_types),
        name="fedsparse",
        **both,
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


def grouplasso(
    lr: float = 0.05,
    strength: float = 1e-3,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Yuan & Lin 2006, doi:10.1111/j.1467-9868.2005.00532.x: FedAvg whose units shrink by `strength` a round."""
    e_step = inference.Point(lr, epochs, batch_size)
    return Algorithm(priors.GroupLasso(strength), e_step, codec=Sparse(), weighting=weighting, name="grouplasso")


def topk(
    lr: float = 0.05,
    fraction: float = 0.05,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
    value_type: ValueType = "float32",
    entropy: Entropy = "zlib",
) -> Algorithm:
    """Stich et al. 2018, arXiv:1809.07599: FedAvg whose clients send the largest differences, and the rest later."""
    e_step, codec = inference.Point(lr, epochs, batch_size), TopK(fraction, value_type, entropy)
    return Algorithm(
        priors.Gaussian(),
        e_step,
        codec=codec,
        weighting=weighting,
        downlink=Dense(),
        delta=True,
        feedback=True,
        name="topk",
    )


ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    f.__name__: f
    for f in (fedavg, fedprox, fedavgm, fedadagrad, fedadam, fedyogi, fedsparse, feddropout, grouplasso, topk)
}
