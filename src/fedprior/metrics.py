"""Metrics are sums over examples, so they can be added across batches and clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fedprior.core import Client, Examples, Params
from fedprior.objective import Objective
from fedprior.rng import generator, seeded_globals


@dataclass(frozen=True)
class Sums:
    """Totals over examples; `+` merges, `means` divides once."""

    totals: Mapping[str, float]
    examples: int

    def __add__(self, other: Sums) -> Sums:
        return Sums({k: v + other.totals[k] for k, v in self.totals.items()}, self.examples + other.examples)

    def means(self) -> dict[str, float]:
        """Per example: nats (negative log-likelihood) and the loss's scores."""
        return {k: v / self.examples for k, v in self.totals.items()}


@torch.no_grad()
def evaluate(objective: Objective, phi: Params, data: Examples, batch_size: int = 1000) -> Sums:
    """The objective's log-likelihood and scores of `data` under phi."""
    if len(data) == 0:
        raise ValueError("cannot evaluate on no examples")
    objective.train(False)
    with seeded_globals(generator(0, "evaluate"), next(iter(phi.values())).device):  # for layers that always draw
        return _evaluate(objective, phi, data, batch_size)


def _evaluate(objective: Objective, phi: Params, data: Examples, batch_size: int) -> Sums:
    device = next(iter(phi.values())).device
    parts = []
    for start in range(0, len(data), batch_size):
        x, y = data.x[start : start + batch_size].to(device), data.y[start : start + batch_size].to(device)
        outputs = objective.outputs(phi, x)
        values = {"nats": -objective.loss.log_lik(outputs, y)}
        values |= {name: score(outputs, y) for name, score in objective.loss.scores.items()}
        parts.append(Sums({k: float(v.double().sum()) for k, v in values.items()}, len(x)))
    return sum(parts[1:], parts[0])


def evaluate_clients(objective: Objective, phi: Params, clients: Iterable[Client]) -> list[dict[str, float | str]]:
    """One row a client: means over its held-out examples, or over its training examples if it has none."""
    rows: list[dict[str, float | str]] = []
    for client in clients:
        held = client.held_out
        data = client.train if held is None or len(held) == 0 else held
        row = {"client": client.name, "examples": len(data), "on": "training" if data is client.train else "held_out"}
        rows.append(row | evaluate(objective, phi, data).means())
    return rows
