r"""Different priors for different parameters of one model, by name.

    log p(phi | eta) = sum_p log p_p(phi_p | eta_p)      phi_p: the parameters that go to part p
    T, eta and the M-step are those of the parts, side by side

A parameter goes to the first part whose pattern matches its name: a glob, or one of

    @head    the last layer that has parameters, in the order in which the model registers its layers
    @norm    the parameters and running moments of all normalisation layers

    paper    code                 shape
    eta_p    eta.part{p}_FIELD    FIELD of part p's own eta; p counts from 0, in the order of the parts
    T_p      t["part{p}_TERM"]    TERM of part p's own statistics

With priors.Personal as a part: Arivazhagan et al. 2019, arXiv:1912.00818 (FedPer); Li et al. 2021, arXiv:2102.07623
(FedBN).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedprior.core import Eta, Params, Stats
from fedprior.objective import params_of
from fedprior.priors.carried import Carried
from fedprior.priors.parts import (
    Moments,
    PartOf,
    assigned,
    check_place,
    globs,
    join_etas,
    join_stats,
    part_etas,
    part_stats,
    take,
)

_NOT_A_PART = ("cut", "sample", "accept", "reference")


@dataclass(frozen=True)
class Split(Carried):
    """Priors over parts of a model; the first pattern that matches a parameter's name decides.

    Attributes:
        parts: pattern -> prior, in order.
        names: the parameters of each part, of the model; empty until `bind`, and then all patterns are globs.
    """

    parts: Mapping[str, Any]
    names: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("Split needs at least one part, such as {'*': Gaussian()}")

    @property
    def beside(self) -> Sequence[Any]:
        """The parts."""
        return tuple(self.parts.values())

    def bind(self, model: nn.Module, x: Tensor) -> Split:
        """The same prior for the names of a model, with its parts bound."""
        params = params_of(model)
        names = assigned(tuple(globs(pattern, model) for pattern in self.parts), tuple(params))
        parts = {}
        for (pattern, prior), own in zip(self.parts.items(), names, strict=True):
            if not own:
                raise ValueError(
                    f"Split: no parameter is left for {pattern!r}; the model has {', '.join(params)}. "
                    f"{getattr(prior, 'needs', 'Patterns are tried in order, and the first match wins')}"
                )
            check_place(prior, _NOT_A_PART, "a part of a Split")
            parts[pattern] = bound = prior.bind(model, x) if hasattr(prior, "bind") else prior
            bound.stats(Moments(take(params, own), type(prior).__name__))
        return replace(self, parts=parts, names=names).recall(params)

    def recall(self, kept: Params) -> Split:
        """As the client with these parameters of its own sees it."""
        parts = {
            pattern: prior.recall(take(kept, own)) if hasattr(prior, "recall") else prior
            for (pattern, prior), own in zip(self.parts.items(), self.names, strict=True)
        }
        return replace(self, parts=parts)

    def _over(self, params: Params) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Each part's prior and names."""
        names = self.names or assigned(tuple((pattern,) for pattern in self.parts), tuple(params))
        return zip(self.parts.values(), names, strict=True)

    def init(self, params: Params) -> Eta:
        """The parts' first etas."""
        return join_etas([prior.init(take(params, own)) for prior, own in self._over(params)])

    def stats(self, q: Any) -> Stats:
        """The parts' statistics of the posterior's parts."""
        return join_stats([prior.stats(PartOf(q, own)) for prior, own in self._over(q.mean())])

    def message(self, eta: Eta, q: Any) -> Stats:
        """The parts' messages."""

        def send(prior: Any, eta: Eta, part: PartOf) -> Stats:
            return prior.message(eta, part) if hasattr(prior, "message") else prior.stats(part).only(prior.uplink)

        parts = zip(self._over(q.mean()), part_etas(eta), strict=True)
        return join_stats([send(prior, part, PartOf(q, own)) for (prior, own), part in parts])

    def kept(self, q: Any) -> Params:
        """What stays with the client."""
        keepers = [(prior, own) for prior, own in self._over(q.mean()) if hasattr(prior, "kept")]
        return {name: value for prior, own in keepers for name, value in prior.kept(PartOf(q, own)).items()}

    def effects(self, phi: Params) -> Params:
        """What is a client's own and has a law (inference.Chain)."""
        parts = [(prior, own) for prior, own in self._over(phi) if hasattr(prior, "effects")]
        return {name: value for prior, own in parts for name, value in prior.effects(take(phi, own)).items()}

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """The parts' sum."""
        parts = zip(self.parts.values(), part_etas(eta), strict=True)
        return sum((p.log_prob(part, part_stats(t, i)) for i, (p, part) in enumerate(parts)), torch.zeros(()))

    def log_hyper(self, eta: Eta, before: Eta) -> Tensor:
        """The sum over the parts that have one."""
        parts = zip(self.parts.values(), part_etas(eta), part_etas(before), strict=True)
        return sum((p.log_hyper(new, old) for p, new, old in parts if hasattr(p, "log_hyper")), torch.zeros(()))

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """The parts' M-steps."""
        parts = zip(self.parts.values(), part_etas(eta), strict=True)
        return join_etas([prior.m_step(part, part_stats(t, i)) for i, (prior, part) in enumerate(parts)])

    def point(self, eta: Eta) -> Params:
        """The whole model."""
        parts = zip(self.parts.values(), part_etas(eta), strict=True)
        return {name: value for prior, part in parts for name, value in prior.point(part).items()}

    def project(self, eta: Eta, before: Eta) -> Eta:
        """Each part's."""
        parts = zip(self.parts.values(), part_etas(eta), part_etas(before), strict=True)
        return join_etas([p.project(new, old) if hasattr(p, "project") else new for p, new, old in parts])
