"""Smaller models and smaller messages: FedSparse and its rivals."""

from __future__ import annotations

from typing import Literal

from fedprior import inference, priors, server, wire
from fedprior.algorithm import Algorithm, Weighting
from fedprior.budget import Budget
from fedprior.codecs import Dense, Entropy, Sparse, TopK, ValueType


def fedsparse(
    lr: float = 0.2,
    density: float | None = None,
    budget_mb: float | None = None,
    lambda_0: float | None = None,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
    value_type: ValueType | None = None,
    entropy: Entropy | Literal["auto"] = "auto",
    momentum: float | None = None,
    activations: float | None = None,
    gate_lr: float | None = None,
    precision: float = 0.0,
) -> Algorithm:
    """Louizos et al. 2021, arXiv:2111.10192: a spike-and-slab prior with a gate per unit, hence a smaller model.

    At most one of the three: `density`, which fraction of the parameters is left (0.05 if none is given);
    `budget_mb`, 10^6 bytes in both directions for all rounds, from which density and value type follow; `lambda_0`,
    the price of a parameter in nats, with gates that each client samples and learns by Adam with rate `gate_lr` (0.05).
    `momentum` is the server's (0.5), and `activations` what a share of them costs when a share of the parameters costs
    1 (0.1; priors.SharedGates): 0.5 gives a faster model. These two are not for `lambda_0`, and `gate_lr` is for it.
    `value_type` is that of what clients send; broadcasts have 8 bits at least (wire.chain). `entropy` is "zlib" unless
    it is given, and "none" for float32, which hardly compresses.
    """
    if sum(wish is not None for wish in (density, budget_mb, lambda_0)) > 1:
        raise ValueError(
            "density, budget_mb and lambda_0 each decide how small the model gets: give one of them, "
            f"got {density}, {budget_mb} and {lambda_0}"
        )
    _check_used(lambda_0, momentum, activations, gate_lr)
    value_types = (value_type,) if value_type else ("float32",) if budget_mb is None else ("int8", "int4")
    both = wire.chain(wire.sparse(value_types[0], entropy), value_types[0])
    if lambda_0 is not None:
        gated = inference.Gated(lr, epochs, batch_size, 0.05 if gate_lr is None else gate_lr)
        slab = priors.SpikeSlab(lambda_0, precision)
        return Algorithm(slab, gated, weighting=weighting, name="fedsparse", **both)
    if density is None and budget_mb is None:
        density = 0.05
    momentum, activations = 0.5 if momentum is None else momentum, 0.1 if activations is None else activations
    return Algorithm(
        priors.SharedGates(density, precision=precision, activations=activations),
        inference.Gains(lr, epochs, batch_size),
        server.Momentum(1.0, momentum) if momentum else server.Exact(),
        weighting=weighting,
        budget=None if budget_mb is None else Budget(budget_mb, value_types),
        name="fedsparse",
        **both,
    )


def _check_used(
    lambda_0: float | None, momentum: float | None, activations: float | None, gate_lr: float | None
) -> None:
    """A ValueError for an argument that would change nothing."""
    if lambda_0 is None and gate_lr is not None:
        raise ValueError(
            f"gate_lr={gate_lr} is for gates that clients learn: write lambda_0=... as well, or leave it out"
        )
    for name, value in {"momentum": momentum, "activations": activations}.items():
        if lambda_0 is not None and value is not None:
            raise ValueError(
                f"{name}={value} is not used with lambda_0, whose gates the clients learn: leave it out, or write "
                "density=... or budget_mb=... instead of lambda_0"
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
