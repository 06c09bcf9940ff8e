"""Personalised: every client ends with a model of its own (Result.personal), and shares part of what it learns."""

from __future__ import annotations

from fedprior import inference, priors, server
from fedprior.algorithm import Algorithm, Weighting


def local(
    lr: float = 0.05, epochs: int = 1, batch_size: int | None = 20, weighting: Weighting = "examples"
) -> Algorithm:
    """No federation: every client trains a model of its own, and sends no parameter. What others must beat."""
    return Algorithm(priors.Personal(), inference.Point(lr, epochs, batch_size), weighting=weighting, name="local")


def fedper(
    lr: float = 0.05,
    personal: str = "@head",
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Arivazhagan et al. 2019, arXiv:1912.00818: FedAvg of all but the last layer, which every client has for itself.

    `personal` are the names that stay, as globs with commas between; "@head" is the last layer, "@norm" all
    normalisation layers (priors.Split).
    """
    return Algorithm(
        _split(personal, priors.Personal()), inference.Point(lr, epochs, batch_size), weighting=weighting, name="fedper"
    )


def fedrep(
    lr: float = 0.05,
    personal: str = "@head",
    epochs: int = 1,
    batch_size: int | None = 20,
    personal_epochs: int = 5,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Collins et al. 2021, arXiv:2102.07078: FedPer that trains the personal part first, then the shared one.

    `personal` is as in fedper; `epochs` are those of the shared part.
    """
    own = inference.Point(lr, personal_epochs, batch_size)
    e_step = inference.Alternating(own, inference.Point(lr, epochs, batch_size))
    return Algorithm(_split(personal, priors.Personal()), e_step, weighting=weighting, name="fedrep")


def fedbn(
    lr: float = 0.05,
    personal: str = "@norm",
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Li et al. 2021, arXiv:2102.07623: FedAvg of all but the normalisation layers, with their running moments.

    `personal` is as in fedper.
    """
    return Algorithm(
        _split(personal, priors.Personal()), inference.Point(lr, epochs, batch_size), weighting=weighting, name="fedbn"
    )


def pfedme(
    lr: float = 0.05,
    strength: float = 15.0,
    outer_lr: float = 0.02,
    steps: int = 5,
    server_rate: float = 1.0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "uniform",
) -> Algorithm:
    """Dinh et al. 2020, arXiv:2006.08848: personal models near a shared one, which follows them.

    The paper's lambda is `strength`, its eta `outer_lr`, its K `steps`, its beta `server_rate` (inference.Moreau).
    """
    e_step = inference.Moreau(lr, strength, outer_lr, steps, epochs, batch_size)
    return Algorithm(priors.Gaussian(), e_step, _damped(server_rate), weighting=weighting, name="pfedme")


def ditto(
    lr: float = 0.05,
    strength: float = 1.0,
    personal_lr: float | None = None,
    personal_epochs: int | None = None,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Li et al. 2021, arXiv:2012.04221: FedAvg, and beside it a personal model that is pulled to FedAvg's.

    The paper's lambda is `strength` (inference.Ditto). The personal model has the learning rate and epochs of the
    other one if you give none.
    """
    own = inference.Point(personal_lr or lr, personal_epochs or epochs, batch_size)
    e_step = inference.Ditto(inference.Point(lr, epochs, batch_size), own, strength)
    return Algorithm(priors.Gaussian(), e_step, weighting=weighting, name="ditto")


def pfedbayes(
    lr: float = 0.05,
    zeta: float = 1.0,
    spread: float = 0.03,
    floor: float = 1e-2,
    epochs: int = 4,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Zhang et al. 2022, arXiv:2206.07977: each client has a Gaussian over its weights, pulled to the server's.

    The paper's zeta is as here; `spread` is the width that a client begins with (inference.MeanField), and `floor` the
    server's smallest variance (priors.LearnedScale). The server matches the mean of the clients' moments.
    """
    e_step = inference.MeanField(lr, epochs, batch_size, zeta, spread)
    return Algorithm(priors.LearnedScale(floor), e_step, weighting=weighting, name="pfedbayes")


def pfedvem(
    lr: float = 0.05,
    rho: float = 0.3,
    head: str = "@head",
    epochs: int = 1,
    batch_size: int | None = 20,
    head_epochs: int = 5,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Zhu et al. 2023, arXiv:2305.12557: a Gaussian over each client's head; the sure ones count for more.

    `rho` is the width that a client begins with; `head` a glob, or "@head" for the last layer; `epochs` are those of
    the rest (priors.Confidence, inference.Confidence).
    """
    e_step = inference.Confidence(lr, epochs, batch_size, head_epochs)
    return Algorithm(priors.Confidence(rho, head), e_step, weighting=weighting, name="pfedvem")


def fedpop(
    lr: float = 0.05,
    sigma: float = 0.1,
    head: str = "@head",
    epochs: int = 10,
    burn_in: int = 5,
    batch_size: int | None = 20,
    server_rate: float = 1.0,
    weighting: Weighting = "uniform",
) -> Algorithm:
    """Kotelevskii et al. 2022, arXiv:2206.03611: clients sample heads of their own, of one learned population.

    `sigma` is the population's width before round one; `head` as `personal` in fedper, each pattern with a width of its
    own; `epochs` are those of the chain, `burn_in` included; a `server_rate` below 1 averages statistics over rounds
    (priors.RandomEffects, inference.Chain). One vote a client: they are the population.
    """
    e_step = inference.Chain(lr, epochs, batch_size, burn_in)
    return Algorithm(
        _split(head, priors.RandomEffects(sigma)), e_step, _damped(server_rate), weighting=weighting, name="fedpop"
    )


def _split(names: str, own: priors.Personal | priors.RandomEffects) -> priors.Split:
    """A prior for what is the clients' own, and FedAvg for the rest."""
    parts = {pattern.strip(): own for pattern in names.split(",")}
    return priors.Split({**parts, "*": priors.Gaussian()})


def _damped(rate: float) -> server.Exact | server.Damped:
    """How far the server goes towards the exact M-step."""
    return server.Exact() if rate == 1 else server.Damped(rate)
