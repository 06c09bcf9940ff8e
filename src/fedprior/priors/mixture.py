r"""A mixture of K priors of one kind: every client has a share in each of K models.

    z_s ~ share,   phi_s | z_s = k ~ p(phi | eta_k)            of `prior`; N(w_k, 1/precision) if it is Gaussian

    log p = sum_k pi_k [log share_k + log p(phi_k | eta_k)] - (sum_k share_k - 1)
    log_hyper = (1/K) sum_k log share_k - (sum_k share_k - 1)                   Dirichlet, worth one client

    T = (pi_k T(phi_k), pi_k)                   pi_sk = q(z = k), the client's responsibilities; phi_sk its k-th model
    M-step   eta_k: that of `prior`, for clients that count pi_sk times;     w_k = sum_s pi_sk phi_sk / sum_s pi_sk
             share_k = (sum_s pi_sk + 1/K) / (sum_s 1 + 1)

The last terms of both lines are 0 where the shares sum to 1, which they do at the maximum: they are the multiplier.
A component that has less than 1e-6 of the clients keeps its eta_k. The components start around the model w, for equal
ones would stay equal: w_k = w + spread x rms(w) x noise, tensor by tensor. None starts at w, which may fit all best.

    paper   code                 shape                              paper   code              shape
    eta_k   eta.part{k}_FIELD    FIELD of the prior's own eta       pi      t["pi"]["pi"]     (K,)
    T_k     t["part{k}_TERM"]    TERM of its statistics             share   eta.share         {"pi": (K,)}

Ghosh et al. 2020, arXiv:2006.04088 (IFCA): pi is one-hot; Marfoq et al. 2021, arXiv:2108.10252 (FedEM): pi_s mixes each
of the client's examples. The M-step of FedEM's paper has N_s in the place of N_s pi_sk (inference/mixture.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fedprior.core import Eta, Params, Stats
from fedprior.posteriors import Predictive
from fedprior.priors.gaussian import Gaussian
from fedprior.priors.parts import join_etas, join_stats, names_of_parts, part_etas, part_stats
from fedprior.rng import generator


@dataclass(frozen=True)
class Mixture:
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
    least = 1e-6
    no_place: ClassVar[tuple[str, ...]] = ("cut", "sample", "accept", "reference", "project", "kept", "log_hyper")

    def __post_init__(self) -> None:
        if self.components < 1 or not 0 <= self.spread < math.inf:
            raise ValueError(f"need components >= 1, and a finite spread >= 0, got {self}")
        if unfit := [method for method in self.no_place if hasattr(self.prior, method)]:
            raise TypeError(
                f"{type(self).__name__} has no place for the {', '.join(unfit)} of {type(self.prior).__name__}: use "
                "priors.SparseMixture(prior=SharedGates(...)), or a prior without them"
            )

    @property
    def uplink(self) -> tuple[str, ...]:
        """The components', and pi."""
        return (*names_of_parts([self.prior.uplink] * self.components), "pi")

    @property
    def exact(self) -> tuple[str, ...]:
        """The components', and the shares."""
        return (*names_of_parts([getattr(self.prior, "exact", ())] * self.components), "share")

    def bind(self, model: nn.Module, x: Tensor) -> Self:
        """The model's parameters get noise, its buffers do not."""
        prior = self.prior.bind(model, x) if hasattr(self.prior, "bind") else self.prior
        return replace(self, prior=prior, names=tuple(name for name, _ in model.named_parameters()))

    def init(self, params: Params) -> Eta:
        """Components around the model, with equal shares."""
        rng, noisy = generator(self.seed, "mixture"), params.keys() if self.names is None else self.names

        def around(name: str, w: Tensor) -> Tensor:
            if name not in noisy:
                return w.expand(self.components, *w.shape).clone()
            noise = torch.randn(self.components, *w.shape, generator=rng, dtype=w.dtype).to(w.device)
            return w + self.spread * w.square().mean().sqrt() * noise

        stacked = {name: around(name, w) for name, w in params.items()}
        etas = [self.prior.init({name: w[k] for name, w in stacked.items()}) for k in range(self.components)]
        share = next(iter(params.values())).new_full((self.components,), 1 / self.components)
        return join_etas(etas, share={"pi": share})

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
        share = eta.share["pi"]
        shares = torch.xlogy(t["pi"]["pi"], share).sum() - t.clients * (share.sum() - 1)
        return shares + self.scatter(eta, t)

    def scatter(self, eta: Eta, t: Stats) -> Tensor:
        """sum_k pi_k log p(phi_k | eta_k)."""
        return torch.stack([self.prior.log_prob(part, own) for part, own in self.each(eta, t)]).sum()

    def each(self, eta: Eta, t: Stats) -> Iterator[tuple[Eta, Stats]]:
        """The components, and the statistics of the clients that they have."""
        for k, (part, pi) in enumerate(zip(part_etas(eta), t["pi"]["pi"].tolist(), strict=True)):
            yield part, Stats(part_stats(t, k).terms, pi)

    def log_hyper(self, eta: Eta, before: Eta) -> Tensor:
        """Dirichlet, worth one client: no share becomes 0."""
        share = eta.share["pi"]
        return share.log().mean() - (share.sum() - 1)

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Components by responsibility, and shares."""
        unseen = getattr(self.prior, "idle", lambda part: part)
        etas = [
            self.prior.m_step(part, own) if own.clients > self.least * t.clients else unseen(part)
            for part, own in self.each(eta, t)
        ]
        share = (t["pi"]["pi"] + 1 / self.components) / (t.clients + 1)
        return join_etas(etas, share={"pi": share})

    def points(self, eta: Eta) -> list[Params]:
        """The components' models."""
        return [self.prior.point(part) for part in part_etas(eta)]

    def point(self, eta: Eta) -> Params:
        """That of the component with most clients."""
        return self.prior.point(most(eta))

    def predictive(self, eta: Eta, rng: torch.Generator) -> Predictive:
        """For a client of whom nothing is known: all components by their shares."""
        share = eta.share["pi"] / eta.share["pi"].sum()
        return Predictive(tuple(share.tolist()), tuple(self.points(eta)))


def most(eta: Eta) -> Eta:
    """The component with most clients."""
    return part_etas(eta)[int(eta.share["pi"].argmax())]
