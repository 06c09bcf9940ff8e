r"""Factors exp(-penalty) of a client's prior that know nothing of eta: what inference.Point(penalty=...) takes.

    Kurtosis     strength  mean over layers of (Kurt(W) - target)^2        Kurt(W) = E[((W - mean) / std)^4]
    Similarity   strength  mean over pairs of classes of cos(w_a, w_b)^2   w_a: row a of the last layer's matrix

Both are in nats per client's data set. Kurtosis is KURE (Shkolnik et al. 2020, arXiv:2002.07686), whose target of 1.8
is the kurtosis of a uniform law, the one that rounding to a grid hurts least. Similarity is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedprior.core import Params
from fedprior.objective import Objective
from fedprior.priors.parts import globs


def matrices(objective: Objective, phi: Params) -> Params:
    """The trained parameters with at least two dimensions and two entries: what is rounded to few bits."""
    return {k: phi[k] for k in objective.trainable if phi[k].ndim > 1 and phi[k].numel() > 1}


@dataclass(frozen=True)
class Kurtosis:
    """Weights spread like a uniform law.

    Attributes:
        strength: nats per data set.
        target: kurtosis that costs nothing.
    """

    strength: float = 100.0
    target: float = 1.8

    def __call__(self, objective: Objective, phi: Params) -> Tensor:
        """The penalty, a scalar."""
        gaps = [(_kurtosis(v) - self.target).square() for v in matrices(objective, phi).values()]
        return self.strength * torch.stack(gaps).mean()


@dataclass(frozen=True)
class Similarity:
    """Classes whose weights point in directions of their own.

    Attributes:
        strength: nats per data set.
    """

    strength: float = 10.0

    def __call__(self, objective: Objective, phi: Params) -> Tensor:
        """The penalty, a scalar."""
        (layer,) = globs("@head", objective.model)
        weight = phi[layer.removesuffix("*") + "weight"].flatten(1)
        rows = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
        cosines = (rows @ rows.T).square()
        pairs = len(rows) * (len(rows) - 1)
        return self.strength * (cosines.sum() - cosines.diagonal().sum()) / max(pairs, 1)


def _kurtosis(value: Tensor) -> Tensor:
    centred = value - value.mean()
    return centred.pow(4).mean() / centred.square().mean().clamp(min=1e-24).square()
