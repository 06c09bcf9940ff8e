"""Posteriors drawn at random for a case of the laws' tables, and damage to bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedprior import Params, posteriors, tree
from fedprior.priors.parts import part_etas

if TYPE_CHECKING:
    from cases import Case


@dataclass(frozen=True)
class Diagonal:
    """N(m, diag v), as a mean-field inference would return it."""

    m: Params
    v: Params

    def mean(self) -> Params:
        return self.m

    def second_moment(self) -> Params:
        return tree.map(lambda m, v: m**2 + v, self.m, self.v)


def torn(data: bytes, rng: np.random.Generator, cut: bool) -> bytes:
    """One to three bytes changed, and the end cut off, if it is to be."""
    changed = bytearray(data)
    places = rng.integers(len(changed), size=int(rng.integers(1, 4)))
    for place, value in zip(places, rng.integers(1, 256, size=len(places)), strict=True):
        changed[place] ^= int(value)
    return bytes(changed[: int(rng.integers(len(changed)))] if cut else changed)


def normal(rng: torch.Generator, like: Params) -> Params:
    return {k: torch.randn(v.shape, generator=rng, dtype=v.dtype) for k, v in like.items()}


def uniform(rng: torch.Generator, like: Params, low: float, high: float) -> Params:
    return {k: low + (high - low) * torch.rand(v.shape, generator=rng, dtype=v.dtype) for k, v in like.items()}


def point(case: Case, rng: torch.Generator) -> posteriors.Point:
    return posteriors.Point(normal(rng, case.params))


def diagonal(case: Case, rng: torch.Generator) -> Diagonal:
    return Diagonal(normal(rng, case.params), uniform(rng, case.params, 0.1, 2.0))


def gates(case: Case, rng: torch.Generator) -> Params:
    return {g.name: 0.1 + 0.8 * torch.rand(g.units, generator=rng, dtype=torch.float64) for g in case.prior.groups}


def expected_gates(case: Case, rng: torch.Generator) -> posteriors.Gated:
    pi = gates(case, rng)
    return posteriors.Gated(normal(rng, case.params), pi, pi)


def drawn_gates(case: Case, rng: torch.Generator) -> posteriors.Gated:
    pi = gates(case, rng)
    z = {k: (torch.rand(v.shape, generator=rng, dtype=v.dtype) < v).to(v) for k, v in pi.items()}
    return posteriors.Gated(normal(rng, case.params), pi, z)


def gains(case: Case, rng: torch.Generator) -> posteriors.Gains:
    return of_what_is_left(case.eta(), rng)


def of_what_is_left(eta: Any, rng: torch.Generator) -> posteriors.Gains:
    return posteriors.Gains(normal(rng, eta.mean), uniform(rng, eta.gain, 0.1, 0.9))


def tilted(case: Case, rng: torch.Generator) -> posteriors.Tilted:
    """Of a new client, whose first step is its vector."""
    phi, own = normal(rng, case.params), normal(rng, case.params)
    return posteriors.Tilted(phi, own, own, {"clients": torch.ones((), dtype=torch.float64)})


def precise(case: Case, rng: torch.Generator) -> posteriors.Gaussian:
    return posteriors.Gaussian(normal(rng, case.params), uniform(rng, case.params, 0.5, 2.0))


def scaled(case: Case, rng: torch.Generator) -> posteriors.Scaled:
    return posteriors.Scaled(normal(rng, case.params), uniform(rng, case.params, 0.5, 2.0))


def confident(case: Case, rng: torch.Generator) -> posteriors.Confident:
    """As the E-step makes it: a client's confidence is what the case's first eta gives it."""
    var = uniform(rng, {k: case.params[k] for k in case.prior.names}, 0.5, 2.0)
    q = posteriors.Confident(normal(rng, case.params), var, {})
    return replace(q, confidence=case.prior.confidence(case.eta(), q))


def site(case: Case, rng: torch.Generator) -> posteriors.Site:
    return posteriors.Site(uniform(rng, case.params, 0.1, 2.0), normal(rng, case.params))


def taught(case: Case, rng: torch.Generator) -> posteriors.Distilled:
    return posteriors.Distilled(normal(rng, case.params), normal(rng, case.params))


def mixed(case: Case, rng: torch.Generator) -> posteriors.Mixed:
    """Three components, of which the client has a part in each."""
    parts = tuple(posteriors.Point(normal(rng, case.params)) for _ in range(3))
    return posteriors.Mixed(parts, {"pi": torch.randn(3, generator=rng, dtype=torch.float64).softmax(0)})


def mixed_gains(case: Case, rng: torch.Generator) -> posteriors.Mixed:
    """Two components, of which the client has a part in each."""
    parts = tuple(of_what_is_left(part, rng) for part in part_etas(case.eta()))
    return posteriors.Mixed(parts, {"pi": torch.randn(2, generator=rng, dtype=torch.float64).softmax(0)})


def drawn_rules(case: Case, rng: torch.Generator) -> posteriors.Point:
    return posteriors.Point(tree.map(lambda v: v.softmax(1), normal(rng, case.params)))
