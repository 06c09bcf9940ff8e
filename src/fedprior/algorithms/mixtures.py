"""Several models at the server: clients have a share in each, or belong to one; sparse ones."""

from __future__ import annotations

from typing import Literal

from fedprior import inference, priors, wire
from fedprior.algorithm import Algorithm, Weighting
from fedprior.codecs import Entropy, ValueType


def fedem(
    lr: float = 0.05,
    components: int = 3,
    spread: float = 0.5,
    start: int = 0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Marfoq et al. 2021, arXiv:2108.10252: every example comes from one of a few models, in a client's own shares.

    The models start around yours, at a distance of `spread` times its weights; `start` is the seed (priors.Mixture).
    All of them travel.
    """
    e_step = inference.Mixture(inference.Point(lr, epochs, batch_size))
    return Algorithm(priors.Mixture(components, spread=spread, seed=start), e_step, weighting=weighting, name="fedem")


def ifca(
    lr: float = 0.05,
    clusters: int = 2,
    spread: float = 0.5,
    start: int = 0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Ghosh et al. 2020, arXiv:2006.04088: every client trains the one of a few models that fits it best.

    The models start around yours, at a distance of `spread` times its weights; `start` is the seed (priors.Mixture). If
    all clients begin with the same one, they stay with it: try another `start`. A client's message has a slot for each
    model, so that a sum over clients does not tell which was whose.
    """
    e_step = inference.Mixture(inference.Point(lr, epochs, batch_size), hard=True)
    return Algorithm(priors.Mixture(clusters, spread=spread, seed=start), e_step, weighting=weighting, name="ifca")


def fedhbmixture(
    lr: float = 0.05,
    components: int = 2,
    precision: float = 10.0,
    clients: float | None = None,
    spread: float = 0.5,
    start: int = 0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "uniform",
    ridge: float = 0.1,
) -> Algorithm:
    """Kim & Hospedales 2023, arXiv:2305.04979: clients' models lie around a few centres, which a prior shrinks.

    The paper's sigma^2 is 1 / `precision`; `clients` is how many there are in all (priors.Centres). The centres start
    around your model, at a distance of `spread` times its weights; `start` is the seed. All of them travel. Their prior
    is worth `ridge` / `precision` clients at 0; the paper's ridge of 1 shrinks the centres of a few clients.
    """
    prior = priors.Centres(
        components, priors.Gaussian(precision), spread=spread, seed=start, ridge=ridge, clients=clients
    )
    e_step = inference.Centres(lr, epochs, batch_size)
    return Algorithm(prior, e_step, weighting=weighting, name="fedhbmixture")


def fedsparsemixture(
    lr: float = 0.3,
    density: float = 0.1,
    clusters: int = 2,
    spread: float = 0.5,
    start: int = 0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "examples",
    value_type: ValueType = "float32",
    entropy: Entropy | Literal["auto"] = "auto",
) -> Algorithm:
    """Ghosh et al. 2020, Louizos et al. 2021: IFCA whose models are sparse, each with units of its own.

    `density` is of each model (priors.SharedGates); the others are those of ifca and fedsparse. A client sends the
    sparse model of its own cluster, and receives all of them.
    """
    prior = priors.SparseMixture(clusters, priors.SharedGates(density), spread=spread, seed=start)
    e_step = inference.Mixture(inference.Gains(lr, epochs, batch_size), hard=True)
    both = wire.chain(wire.sparse(value_type, entropy), value_type)
    return Algorithm(prior, e_step, weighting=weighting, name="fedsparsemixture", **both)
