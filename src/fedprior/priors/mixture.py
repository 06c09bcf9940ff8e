r"""A mixture of K priors of one kind: every client has a share in each of K models.

    z_s ~ share,   phi_s | z_s = k ~ p(phi | eta_k)            of `prior`; N(w_k, 1/precision) if it is Gaussian

    log p = sum_k pi_k [log share_k + log p(phi_k | eta_k)]

    T = (pi_k T(phi_k), pi_k)                   pi_sk = q(z = k), the client's responsibilities; phi_sk its k-th model
    M-step   eta_k: that of `prior`, for clients that count pi_sk times;     w_k = sum_s pi_sk phi_sk / sum_s pi_sk

The shares, under a Dirichlet, and where the components start: components.py. None starts at the model, which may fit
all best. A component that has less than 1e-6 of the clients keeps its eta_k.

    paper   code                 shape                              paper   code              shape
    eta_k   eta.part{k}_FIELD    FIELD of the prior's own eta       pi      t["pi"]["pi"]     (K,)
    T_k     t["part{k}_TERM"]    TERM of its statistics             share   eta.share         {"pi": (K,)}

Ghosh et al. 2020, arXiv:2006.04088 (IFCA): pi is one-hot; Marfoq et al. 2021, arXiv:2108.10252 (FedEM): pi_s mixes each
of the client's examples. The M-step of FedEM's paper has N_s in the place of N_s pi_sk (inference/mixture.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fedprior.core import Eta, Params, Stats
from fedprior.posteriors import Predictive
from fedprior.priors import components
from fedprior.priors.gaussian import Gaussian
from fedprior.priors.parts import check_place, join_etas, join_stats, part_etas


@dataclass(frozen=True)
class Mixture(components.Wire):
    """K priors with an eta each.

    Attributes:
        components: K, >= 1.
        prior: of each component.
        spread: of the first components, as a fraction of a tensor's root mean square; >= 0.
        seed: of their noise.
        names: the parameters that get noise, which running moments must not; None for all, until `bind`.
    """

    components: int = 3
    prior: Any = field(default_factory=Gaussian)
    spread: float = 0.5
    seed: int = 0
    names: tuple[str, ...] | None = field(default=None, repr=False)
    no_place: ClassVar[tuple[str, ...]] = ("cut", "sample", "accept", "reference", "project", "kept", "log_hyper")

    def __post_init__(self) -> None:
        if self.components < 1 or not 0 <= self.spread < math.inf:
            raise ValueError(f"need components >= 1, and a finite spread >= 0, got {self}")
        check_place(self.prior, self.no_place, "a component of a Mixture; SparseMixture takes SharedGates")

    def bind(self, model: nn.Module, x: Tensor) -> Self:
        """The model's parameters get noise, its buffers do not."""
        prior = self.prior.bind(model, x) if hasattr(self.prior, "bind") else self.prior
        return replace(self, prior=prior, names=tuple(name for name, _ in model.named_parameters()))

    def init(self, params: Params) -> Eta:
        """Components around the model, with equal shares."""
        starts = components.apart(params, self.components, self.spread, self.seed, self.names)
        return join_etas([self.prior.init(w) for w in starts], share=components.equal_shares(params, self.components))

    def stats(self, q: Any) -> Stats:
        """Each component's as often as the client has it."""
        if not hasattr(q, "pi"):
            raise TypeError(
                f"{type(self).__name__} needs responsibilities, and {type(q).__name__} has none: use inference.Mixture"
            )
        parts = [self.prior.stats(part).weighted(pi) for part, pi in zip(q.parts, q.pi["pi"].tolist(), strict=True)]
        return Stats({**join_stats(parts).terms, "pi": q.pi})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """Of shares and components."""
        return components.share_log_prob(eta.share["pi"], t["pi"]["pi"], t.clients) + self.scatter(eta, t)

    def scatter(self, eta: Eta, t: Stats) -> Tensor:
        """sum_k pi_k log p(phi_k | eta_k)."""
        return torch.stack([self.prior.log_prob(*one) for one in components.each(eta, t)]).sum()

    def log_hyper(self, eta: Eta, before: Eta) -> Tensor:
        """Of the shares."""
        return components.share_log_hyper(eta.share["pi"])

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Components by responsibility, and shares."""
        unseen, parts = getattr(self.prior, "unseen", lambda part: part), components.each(eta, t)
        etas = [self.prior.m_step(e, own) if components.seen(own.clients, t) else unseen(e) for e, own in parts]
        return join_etas(etas, share=components.share_m_step(t["pi"]["pi"], t.clients))

    def points(self, eta: Eta) -> list[Params]:
        """The components' models."""
        return [self.prior.point(part) for part in part_etas(eta)]

    def point(self, eta: Eta) -> Params:
        """That of the component with most clients."""
        return self.prior.point(components.most(eta))

    def predictive(self, eta: Eta, rng: torch.Generator) -> Predictive:
        """For a client of whom nothing is known: all components by their shares."""
        return components.by_share(eta.share["pi"], self.points(eta))
