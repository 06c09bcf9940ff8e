r"""What mixtures are made of: components that start apart, and the shares of the clients that they have.

    w_k = w + spread x rms(w) x noise, tensor by tensor             equal components would stay equal

    log p(z) = sum_k pi_k log share_k - clients (sum_k share_k - 1)
    log_hyper = (1/K) sum_k log share_k - (sum_k share_k - 1)       Dirichlet, worth one client: no share becomes 0
    share_k = (sum_s pi_sk + 1/K) / (sum_s 1 + 1)                   the maximum of their sum

The last terms of both lines are 0 where the shares sum to 1, which they do at the maximum: they are the multiplier.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedprior.core import Eta, Params, Stats
from fedprior.posteriors import Predictive
from fedprior.priors.carried import Carried
from fedprior.priors.parts import part_etas, part_stats
from fedprior.rng import generator


class Wire(Carried):
    """What travels of `components` components, each with the same `prior`."""

    components: int
    prior: Any
    own: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({"uplink": ("pi",), "exact": ("share",)})

    @property
    def beside(self) -> Sequence[Any]:
        """The components."""
        return [self.prior] * self.components


def apart(params: Params, components: int, spread: float, seed: int, noisy: Collection[str] | None) -> list[Params]:
    """The first components; `noisy` names the parameters that get noise, None for all."""
    rng = generator(seed, "mixture")

    def around(name: str, w: Tensor) -> Tensor:
        if noisy is not None and name not in noisy:
            return w.expand(components, *w.shape).clone()
        noise = torch.randn(components, *w.shape, generator=rng, dtype=w.dtype).to(w.device)
        return w + spread * w.square().mean().sqrt() * noise

    stacked = {name: around(name, w) for name, w in params.items()}
    return [{name: w[k] for name, w in stacked.items()} for k in range(components)]


def equal_shares(params: Params, components: int) -> Params:
    """1/K each."""
    return {"pi": next(iter(params.values())).new_full((components,), 1 / components)}


def share_log_prob(share: Tensor, pi: Tensor, clients: float) -> Tensor:
    """log p(z) summed over clients, whose responsibilities sum to `pi`."""
    return torch.xlogy(pi, share).sum() - clients * (share.sum() - 1)


def share_log_hyper(share: Tensor) -> Tensor:
    """Dirichlet, worth one client."""
    return share.log().mean() - (share.sum() - 1)


def share_m_step(pi: Tensor, clients: float) -> Params:
    """The shares."""
    return {"pi": (pi + 1 / len(pi)) / (clients + 1)}


def each(eta: Eta, t: Stats) -> Iterator[tuple[Eta, Stats]]:
    """The components, and the statistics of the clients that they have."""
    for k, (part, pi) in enumerate(zip(part_etas(eta), t["pi"]["pi"].tolist(), strict=True)):
        yield part, Stats(part_stats(t, k).terms, pi)


def most(eta: Eta) -> Eta:
    """The component with most clients."""
    return part_etas(eta)[int(eta.share["pi"].argmax())]


def by_share(share: Tensor, models: Sequence[Params]) -> Predictive:
    """For a client of whom nothing is known: all models by their shares."""
    return Predictive(tuple((share / share.sum()).tolist()), tuple(models))


def seen(pi: float, t: Stats) -> bool:
    """Has a component of so many clients more than 1e-6 of all?"""
    return pi > 1e-6 * t.clients
