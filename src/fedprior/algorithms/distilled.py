"""Distilled predictives, personal prior means, and models made for few bits."""

from __future__ import annotations

from fedprior import inference, penalties, priors
from fedprior.algorithm import Algorithm, Weighting
from fedprior.inference.bregman import Strategy


def pfedbred(
    lr: float = 0.05,
    strategy: Strategy = "meta",
    strength: float = 15.0,
    outer_lr: float = 0.01,
    reach: float = 0.05,
    steps: int = 5,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Shi et al. 2023, arXiv:2310.09183: pFedMe around a prior mean that each client makes for itself.

    The paper's lambda is `strength`, its eta `reach`, its K `steps`; its mh, meg and lg are the strategies "meta",
    "memory" and "gradient" (inference.Bregman).
    """
    e_step = inference.Bregman(lr, strategy, strength, outer_lr, reach, steps, epochs, batch_size)
    return Algorithm(priors.Gaussian(), e_step, weighting=weighting, name="pfedbred")


def fedppd(
    lr: float = 0.05,
    student_lr: float | None = None,
    temperature: float = 0.1,
    epochs: int = 2,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Bhatt et al. 2023, arXiv:2206.07562: clients sample by Langevin steps, and a student learns what the samples say.

    The student has the teacher's rate if you give none. The paper's temperature is 4 / N_s, its epochs are 10.
    """
    e_step = inference.Langevin(lr, student_lr or lr, epochs, batch_size, temperature)
    return Algorithm(priors.Distilled(), e_step, weighting=weighting, name="fedppd")


def kure(
    lr: float = 0.05,
    strength: float = 10.0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Gupta et al. 2023, arXiv:2206.10844: FedAvg whose weights spread evenly, so that rounding hurts less.

    `strength` is in nats per data set (penalties.Kurtosis): N_s times the paper's lambda.
    """
    e_step = inference.Point(lr, epochs, batch_size, penalty=penalties.Kurtosis(strength))
    return Algorithm(priors.Gaussian(), e_step, weighting=weighting, name="kure")


def apqn(
    lr: float = 0.05,
    bits: int = 4,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Gupta et al. 2023, arXiv:2206.10844: FedAvg trained under noise as wide as the grid of `bits`."""
    e_step = inference.Rough(lr, epochs, batch_size, "noise", (bits,))
    return Algorithm(priors.Gaussian(), e_step, weighting=weighting, name="apqn")


def mqat(
    lr: float = 0.05,
    bits: tuple[int, ...] = (8, 4, 2),
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Gupta et al. 2023, arXiv:2206.10844: FedAvg trained at weights rounded to bits drawn from `bits`."""
    e_step = inference.Rough(lr, epochs, batch_size, "rounding", bits)
    return Algorithm(priors.Gaussian(), e_step, weighting=weighting, name="mqat")


def decoupled(
    lr: float = 0.05,
    strength: float = 10.0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """FedPer whose classes are pushed apart (penalties.Similarity). Of FedPDN's type, as far as that is known; ours."""
    split = priors.Split({"@head": priors.Personal(), "*": priors.Gaussian()})
    e_step = inference.Point(lr, epochs, batch_size, penalty=penalties.Similarity(strength))
    return Algorithm(split, e_step, weighting=weighting, name="decoupled")
