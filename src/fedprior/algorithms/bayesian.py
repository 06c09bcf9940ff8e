"""Corrections that clients remember, and posteriors that are Gaussian: M-steps in natural parameters."""

from __future__ import annotations

from fedprior import inference, priors, server
from fedprior.algorithm import Algorithm, Weighting


def scaffold(
    lr: float = 0.05,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Karimireddy et al. 2020, arXiv:1910.06378: FedAvg with a control variate for each client's drift."""
    e_step = inference.Tilted(lr, epochs, batch_size)
    return Algorithm(priors.Scaffold(), e_step, weighting=weighting, name="scaffold")


def feddyn(
    lr: float = 0.05,
    alpha: float = 0.1,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Acar et al. 2021, arXiv:2111.04263: FedProx with a multiplier for each client; alpha is per example."""
    e_step = inference.Tilted(lr, epochs, batch_size)
    return Algorithm(priors.FedDyn(alpha), e_step, weighting=weighting, name="feddyn")


def fola(
    lr: float = 0.05,
    pull: float = 1.0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Liu et al. 2021, arXiv:2102.01936: online Laplace; clients' diagonal Gaussians are multiplied."""
    e_step = inference.Laplace(lr, epochs, batch_size)
    return Algorithm(priors.OnlineLaplace(pull), e_step, weighting=weighting, name="fola")


def fedhb(
    lr: float = 0.05,
    scale: float = 1.0,
    clients: float | None = None,
    epochs: int = 1,
    batch_size: int | None = 20,
    kappa: float = 0.01,
) -> Algorithm:
    """Kim & Hospedales 2023, arXiv:2305.04979: a Gaussian whose mean and variance have a normal-inverse-Wishart prior.

    `clients` is how many there are, if not all take part in every round. One vote a client: they are the observations.
    The hyper-prior is worth `kappa` clients at 0; the paper's 1 shrinks the model of a few clients every round.
    """
    e_step = inference.Point(lr, epochs, batch_size)
    return Algorithm(priors.NIW(scale, kappa, clients=clients), e_step, name="fedhb")


def learnedscale(
    lr: float = 0.05,
    floor: float = 1e-2,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Gelman et al. 2013, chapter 5: FedProx whose pull is learned for every weight."""
    e_step = inference.Point(lr, epochs, batch_size)
    return Algorithm(priors.LearnedScale(floor), e_step, weighting=weighting, name="learnedscale")


def laplace(
    lr: float = 0.05,
    scale: float = 0.5,
    smooth: float = 1e-2,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Andrews & Mallows 1974, doi:10.1111/j.2517-6161.1974.tb00989.x: clients differ in few weights; w is a median."""
    e_step = inference.Reweighted(lr, epochs, batch_size)
    return Algorithm(priors.ScaleMixture("laplace", scale, smooth), e_step, weighting=weighting, name="laplace")


def horseshoe(
    lr: float = 0.05,
    scale: float = 0.5,
    smooth: float = 1e-2,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Carvalho et al. 2010, doi:10.1093/biomet/asq017: clients differ in few weights, and in those without a limit."""
    e_step = inference.Reweighted(lr, epochs, batch_size)
    return Algorithm(priors.ScaleMixture("horseshoe", scale, smooth), e_step, weighting=weighting, name="horseshoe")


def fedpa(
    lr: float = 0.05,
    shrinkage: float = 0.01,
    server_lr: float = 0.5,
    momentum: float = 0.9,
    epochs: int = 5,
    burn_in: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Al-Shedivat et al. 2021, arXiv:2010.05273: clients send the slope of a Gaussian posterior from SGD's iterates."""
    e_step = inference.Averaged(lr, epochs, batch_size, burn_in, shrinkage=shrinkage)
    step = server.Momentum(server_lr, momentum)
    return Algorithm(priors.Gaussian(), e_step, step, weighting=weighting, name="fedpa")


def pvi(
    lr: float = 0.1,
    precision: float = 100.0,
    damping: float = 0.25,
    levenberg: float = 4.0,
    trust: float = 0.03,
    epochs: int = 1,
    batch_size: int | None = 20,
) -> Algorithm:
    """Bui et al. 2018, arXiv:1811.11206: a Gaussian over shared weights, and a factor that each client refines.

    `precision` is that of the prior around the initial model; a damping of 1 is none. One vote a client. `levenberg`
    makes steps more cautious; `trust` is how much a client believes the others when it predicts for itself.
    """
    e_step = inference.Sites(lr, epochs, batch_size, damping, levenberg=levenberg, trust=trust)
    return Algorithm(priors.Sites(precision), e_step, name="pvi")


def fedep(
    lr: float = 0.1,
    precision: float = 100.0,
    damping: float = 0.25,
    levenberg: float = 4.0,
    trust: float = 0.03,
    epochs: int = 1,
    batch_size: int | None = 20,
) -> Algorithm:
    """Guo et al. 2023, arXiv:2302.04228: expectation propagation; tilted moments by Laplace's approximation."""
    e_step = inference.Sites(lr, epochs, batch_size, damping, spread=0.1, levenberg=levenberg, trust=trust)
    return Algorithm(priors.Sites(precision), e_step, name="fedep")


def fedsep(
    lr: float = 0.1,
    clients: int = 100,
    precision: float = 100.0,
    damping: float = 0.25,
    levenberg: float = 4.0,
    trust: float = 0.03,
    epochs: int = 1,
    batch_size: int | None = 20,
) -> Algorithm:
    """Guo et al. 2023, arXiv:2302.04228: fedep whose clients keep nothing; `clients` is how many there are."""
    e_step = inference.Sites(lr, epochs, batch_size, damping, 0.1, clients, levenberg, trust)
    return Algorithm(priors.Sites(precision), e_step, name="fedsep")
