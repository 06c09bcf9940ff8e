"""What the E-steps that sample share: a Langevin chain over some of a model's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from fedprior.core import Client, Params
from fedprior.inference.ascent import Descent, Epochs, ascend, leaves
from fedprior.objective import Objective


def walk(
    how: Epochs,
    objective: Objective,
    phi: Params,
    term: Callable[[Params], Tensor | float],
    client: Client,
    rng: torch.Generator,
    names: Collection[str] | None = None,
    temperature: float = 1.0,
) -> Iterator[Params]:
    """A Langevin chain from phi: phi <- phi + lr g + sqrt(2 temperature lr / N_s) xi, a copy of it after each epoch.

    Args:
        how: rate, epochs and batches.
        objective: the model and its loss.
        phi: where it begins.
        term: phi -> log-density of the prior, in nats per example: divided by N_s.
        client: whose examples.
        rng: of batches and noise.
        names: what moves, or all; buffers do in any case.
        temperature: of the posterior.
    """
    phi, trained = leaves(objective, phi, names)
    width = math.sqrt(2 * temperature * how.lr / len(client.train))

    def bound(x: Tensor, y: Tensor) -> Tensor:
        return objective.log_lik(phi, x, y) + term(phi)

    @torch.no_grad()
    def shake() -> None:
        for v in trained:
            v.add_(torch.randn(v.shape, generator=rng, dtype=v.dtype).to(v.device), alpha=width)

    optimizers = [Descent(trained, how.lr)]
    for _ in range(how.epochs):
        objective.train()
        with objective.holding(phi):
            ascend(bound, client.train, optimizers, 1, how.batch_size, rng, shake, objective.smallest_batch)
        yield {k: v.detach().clone() for k, v in phi.items()}
