"""A client's posterior q(phi_s): what an E-step returns and `prior.stats` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedprior import tree
from fedprior.core import Params


@dataclass(frozen=True)
class Point:
    """All mass on one value (hard EM).

    Attributes:
        phi: the value, shapes as the parameters.
    """

    phi: Params

    def mean(self) -> Params:
        """E[phi]."""
        return self.phi

    def second_moment(self) -> Params:
        """E[phi^2], elementwise."""
        return tree.map(torch.square, self.phi)


@dataclass(frozen=True)
class Gated:
    """A point in the weights and a Bernoulli gate per unit: q(z_g = 1) = keep_g.

    Attributes:
        phi: the weights given that their gates are open, shapes as the parameters.
        keep: group -> (units,) probabilities.
        gate: group -> (units,) E[z]: `keep` itself, or one draw z ~ keep, which is unbiased and sparse.
    """

    phi: Params
    keep: Params
    gate: Params

    def mean(self) -> Params:
        """The weights given open gates (the mode of q)."""
        return self.phi

    def second_moment(self) -> Params:
        """E[phi^2] given open gates, elementwise."""
        return tree.map(torch.square, self.phi)


@dataclass(frozen=True)
class Gains:
    """A point in the weights, and what each unit is worth to the client.

    Attributes:
        phi: the weights, shapes as the parameters.
        gain: group -> (units,) nats of log-likelihood that closing the unit would cost.
    """

    phi: Params
    gain: Params

    def mean(self) -> Params:
        """The weights."""
        return self.phi


@dataclass(frozen=True)
class Predictive:
    r"""What is predicted with: p(y | x) = sum_k weight_k p(y | f(x; phi_k)).

    One entry for a point, equal weights for samples, responsibilities for a mixture; Objective.predict mixes.

    Attributes:
        weights: (k,), >= 0, with sum 1.
        models: k Params, all of the same model.
    """

    weights: tuple[float, ...]
    models: tuple[Params, ...]

    def __post_init__(self) -> None:
        if not self.models or len(self.weights) != len(self.models):
            raise ValueError(f"{len(self.weights)} weights for {len(self.models)} models: give one for each, and one")
        if not (min(self.weights) >= 0 and abs(sum(self.weights) - 1) < 1e-5):
            raise ValueError(f"weights must be >= 0 and have sum 1, got {self.weights}; divide them by their sum")

    @classmethod
    def point(cls, phi: Params) -> Predictive:
        """One model."""
        return cls((1.0,), (phi,))

    @classmethod
    def equal(cls, models: Sequence[Params]) -> Predictive:
        """Samples of a posterior."""
        return cls((1 / len(models),) * len(models), tuple(models))


@dataclass(frozen=True)
class Tilted:
    """A point found with a linear term in the objective, and what that did to the client's own vector.

    Attributes:
        phi: the weights, shapes as the parameters.
        tilt: the slope of the linear term <tilt, phi>, per example.
        step: the change of the client's own vector (a control variate, a multiplier).
        new: {"clients": 1} for a client that had no vector before, else 0.
    """

    phi: Params
    tilt: Params
    step: Params
    new: Params

    def mean(self) -> Params:
        """The weights."""
        return self.phi

    def second_moment(self) -> Params:
        """E[phi^2], elementwise."""
        return tree.map(torch.square, self.phi)


@dataclass(frozen=True)
class Gaussian:
    """N(phi, 1/precision), entry by entry.

    Attributes:
        phi: the mean, shapes as the parameters.
        precision: > 0, shapes as the parameters.
    """

    phi: Params
    precision: Params

    def mean(self) -> Params:
        """E[phi]."""
        return self.phi

    def second_moment(self) -> Params:
        """E[phi^2], elementwise."""
        return tree.map(lambda m, p: m**2 + 1 / p, self.phi, self.precision)


@dataclass(frozen=True)
class Scaled:
    """A point in the weights, and what is expected of the scale that each came from.

    Attributes:
        phi: the weights, shapes as the parameters.
        confidence: E[1/tau^2] given phi, shapes as the parameters.
    """

    phi: Params
    confidence: Params

    def mean(self) -> Params:
        """The weights."""
        return self.phi

    def second_moment(self) -> Params:
        """E[phi^2], elementwise."""
        return tree.map(torch.square, self.phi)


@dataclass(frozen=True)
class Confident:
    """N(phi, var) in some parameters and a point in the others, and how sure the client is of its prior.

    Attributes:
        phi: the means, shapes as the parameters.
        var: of the parameters that are uncertain, > 0.
        confidence: {"c": scalar}, 1 / rho^2 in units of the prior's (priors.Confidence).
    """

    phi: Params
    var: Params
    confidence: Params

    def mean(self) -> Params:
        """E[phi]."""
        return self.phi

    def second_moment(self) -> Params:
        """E[phi^2], elementwise."""
        return {k: m**2 + self.var[k] if k in self.var else m**2 for k, m in self.phi.items()}


@dataclass(frozen=True)
class Samples:
    """Equally likely values of some parameters, and a point in the others.

    Attributes:
        phi: the point, shapes as the parameters; of the sampled ones, the last sample.
        samples: values of those that are sampled, one Params a sample; at least one.
    """

    phi: Params
    samples: tuple[Params, ...]

    def mean(self) -> Params:
        """E[phi]."""
        return self.phi | tree.map(lambda *v: torch.stack(v).mean(0), *self.samples)

    def second_moment(self) -> Params:
        """E[phi^2], elementwise."""
        squares = (tree.map(torch.square, sample) for sample in self.samples)
        return tree.map(torch.square, self.phi) | tree.map(lambda *v: torch.stack(v).mean(0), *squares)


@dataclass(frozen=True)
class Site:
    """The change of a client's Gaussian factor, in natural parameters.

    Attributes:
        precision: shapes as the parameters.
        shift: of precision times mean, shapes as the parameters.
    """

    precision: Params
    shift: Params


@dataclass(frozen=True)
class Mixed:
    """A few models, and how much of the client comes from each.

    Attributes:
        parts: K posteriors, one a model.
        pi: {"pi": (K,)}, >= 0, with sum 1.
    """

    parts: tuple[Any, ...]
    pi: Params


@dataclass(frozen=True)
class Distilled:
    """A sample of a posterior, and a model that predicts what many samples do.

    Attributes:
        phi: the sample (the teacher), shapes as the parameters.
        student: shapes as the parameters.
    """

    phi: Params
    student: Params

    def mean(self) -> Params:
        """The sample."""
        return self.phi

    def second_moment(self) -> Params:
        """The sample's squares, elementwise."""
        return tree.map(torch.square, self.phi)
