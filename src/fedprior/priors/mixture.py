r"""A mixture of K Gaussians: every client has a share in each of K models.

    z_s ~ share,   phi_s | z_s = k ~ N(w_k, (1/precision) I)

    log p = sum_k pi_k [log share_k - (precision/2) |phi_k - w_k|^2] - (sum_k share_k - 1)
    log_hyper = (1/K) sum_k log share_k - (sum_k share_k - 1)                   Dirichlet, worth one client

    T = (pi_k phi_k, pi_k phi_k^2, pi_k)        pi_sk = q(z = k), the client's responsibilities; phi_sk its k-th model
    M-step   w_k = sum_s pi_sk phi_sk / sum_s pi_sk,      share_k = (sum_s pi_sk + 1/K) / (sum_s 1 + 1)

The last terms of both lines are 0 where the shares sum to 1, which they do at the maximum: they are the multiplier.
A component that has less than 1e-6 of the clients keeps its w_k. The components start around the model w, for equal
ones would stay equal: w_k = w + spread x rms(w) x noise, tensor by tensor. None starts at w, which may fit all best.

    paper   code         shape                                 paper   code              shape
    w       eta.mean     (K, ...) for a parameter's (...)      pi      t["pi"]["pi"]     (K,)
    share   eta.share    {"pi": (K,)}

Ghosh et al. 2020, arXiv:2006.04088 (IFCA): pi is one-hot; Marfoq et al. 2021, arXiv:2108.10252 (FedEM): pi_s mixes each
of the client's examples. The M-step of FedEM's paper has N_s in the place of N_s pi_sk (inference/mixture.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedprior import tree
from fedprior.core import Params, Stats
from fedprior.posteriors import Predictive
from fedprior.rng import generator


@dataclass(frozen=True)
class Mixture:
    """K Gaussians of the same precision.

    Attributes:
        components: K, >= 1.
        precision: per parameter and per client's data set; 0 is the flat limit.
        spread: of the first components, as a fraction of a tensor's root mean square; >= 0.
        seed: of their noise.
        names: the parameters that get noise, which running moments must not; None for all, until `bind`.
    """

    components: int = 3
    precision: float = 0.0
    spread: float = 0.5
    seed: int = 0
    names: tuple[str, ...] | None = field(default=None, repr=False)
    uplink = ("phi", "pi")
    exact = ("share",)

    class Eta(NamedTuple):
        """The components' means, and how many clients each has."""

        mean: Params
        share: Params

    def __post_init__(self) -> None:
        if self.components < 1 or not all(0 <= v < math.inf for v in (self.precision, self.spread)):
            raise ValueError(f"need components >= 1, and finite precision and spread >= 0, got {self}")

    def bind(self, model: nn.Module, x: Tensor) -> Mixture:
        """The model's parameters get noise, its buffers do not."""
        return replace(self, names=tuple(name for name, _ in model.named_parameters()))

    def init(self, params: Params) -> Eta:
        """Components around the model, with equal shares."""
        rng = generator(self.seed, "mixture")

        def around(name: str, w: Tensor) -> Tensor:
            if self.names is not None and name not in self.names:
                return w.expand(self.components, *w.shape).clone()
            noise = torch.randn(self.components, *w.shape, generator=rng, dtype=w.dtype).to(w.device)
            return w + self.spread * w.square().mean().sqrt() * noise

        first = next(iter(params.values()))
        share = first.new_full((self.components,), 1 / self.components)
        return self.Eta({name: around(name, w) for name, w in params.items()}, {"pi": share})

    def stats(self, q: Any) -> Stats:
        """Each component as often as the client has it."""
        if not hasattr(q, "pi"):
            raise TypeError(
                f"priors.Mixture needs responsibilities, and {type(q).__name__} has none: use inference.Mixture"
            )
        phi = tree.map(lambda v: along(q.pi["pi"], v) * v, q.phi)
        return Stats({"phi": phi, "phi_sq": tree.map(torch.mul, phi, q.phi), "pi": q.pi})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """Of shares and components."""
        share = eta.share["pi"]
        shares = torch.xlogy(t["pi"]["pi"], share).sum() - t.clients * (share.sum() - 1)
        return shares + self.scatter(eta, t)

    def scatter(self, eta: Eta, t: Stats) -> Tensor | float:
        """-(precision/2) sum_k pi_k |phi_k - w_k|^2."""
        if self.precision == 0:
            return 0.0
        pi = t["pi"]["pi"]

        def square(w: Tensor, phi: Tensor, phi_sq: Tensor) -> Tensor:
            return phi_sq - 2 * w * phi + along(pi, w) * w**2

        return -0.5 * self.precision * tree.total(tree.map(square, eta.mean, t["phi"], t["phi_sq"]))

    def log_hyper(self, eta: Eta, before: Eta) -> Tensor:
        """Dirichlet, worth one client: no share becomes 0."""
        share = eta.share["pi"]
        return share.log().mean() - (share.sum() - 1)

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Means by responsibility, and shares."""
        pi = t["pi"]["pi"]
        seen = self.seen(t)
        counts = torch.where(seen, pi, torch.ones_like(pi))

        def mean(w: Tensor, phi: Tensor) -> Tensor:
            return torch.where(along(seen, w), phi / along(counts, w), w)

        share = (pi + 1 / self.components) / (t.clients + 1)
        return self.Eta(tree.map(mean, eta.mean, t["phi"]), {"pi": share})

    def seen(self, t: Stats) -> Tensor:
        """Which components have clients, (K,)."""
        return t["pi"]["pi"] > 1e-6 * t.clients

    def point(self, eta: Eta) -> Params:
        """The component with most clients."""
        return component(eta.mean, int(eta.share["pi"].argmax()))

    def predictive(self, eta: Eta, rng: torch.Generator) -> Predictive:
        """For a client of whom nothing is known: all components by their shares."""
        share = eta.share["pi"] / eta.share["pi"].sum()
        return Predictive(tuple(share.tolist()), tuple(component(eta.mean, k) for k in range(self.components)))


def component(stacked: Params, k: int) -> Params:
    """The k-th of several models that are stacked name by name."""
    return {name: value[k] for name, value in stacked.items()}


def along(pi: Tensor, like: Tensor) -> Tensor:
    """(K,) for the first dimension of `like`."""
    return pi.view(-1, *[1] * (like.ndim - 1))
