"""Linear-Gaussian clients: y = x phi + noise, whose optima, Hessians and posteriors have closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fedprior as fp
from fedprior import Client, Examples
from fedprior.codecs import Dense
from fedprior.rng import generator

SIZE = 3


def model() -> nn.Module:
    """x -> <phi, x>, from phi = (0.5, ..., 0.5)."""
    net = nn.Linear(SIZE, 1, bias=False).double()
    nn.init.constant_(net.weight, 0.5)
    return net


def clients(sizes: Sequence[int] = (12, 16, 24), diagonal: bool = False) -> list[Client]:
    """Optima that differ, on designs that differ; with `diagonal`, designs of orthogonal columns."""
    rng, made = generator(0, "quadratics"), []
    for index, size in enumerate(sizes):
        x = torch.randn(size, SIZE, generator=rng, dtype=torch.float64)
        if diagonal:
            lengths = 0.5 + 2 * torch.rand(SIZE, generator=rng, dtype=torch.float64)
            x = torch.linalg.qr(x).Q * lengths * size**0.5
        phi = 2 * torch.randn(SIZE, 1, generator=rng, dtype=torch.float64)
        y = x @ phi + 0.3 * torch.randn(size, 1, generator=rng, dtype=torch.float64)
        made.append(Client(index, f"client-{index}", Examples(x, y)))
    return made


def hessian(client: Client) -> Tensor:
    """Of the mean loss."""
    return client.train.x.T @ client.train.x / len(client.train)


def optimum(client: Client) -> Tensor:
    return torch.linalg.lstsq(client.train.x, client.train.y).solution[:, 0]


def joint(hessians: Sequence[Tensor], optima: Sequence[Tensor]) -> Tensor:
    """The minimiser of sum_s (phi - optimum_s)' H_s (phi - optimum_s) / 2."""
    right = sum(h @ o for h, o in zip(hessians, optima, strict=True))
    return torch.linalg.solve(torch.stack(list(hessians)).sum(0), right)


def weights(population: Sequence[Client], weighting: str) -> list[float]:
    return [float(len(c.train)) if weighting == "examples" else 1.0 for c in population]


def best(population: Sequence[Client], weighting: str) -> Tensor:
    """The minimiser of the weighted sum of the clients' mean losses."""
    counts = weights(population, weighting)
    return joint([n * hessian(c) for n, c in zip(counts, population, strict=True)], [optimum(c) for c in population])


def run(algorithm: fp.Algorithm, population: Sequence[Client], rounds: int, **more: Any) -> fp.Result:
    """In float64, on the wire as well."""
    exact = replace(algorithm, codec=Dense("float64"))
    return fp.run(exact, model(), population, rounds=rounds, loss="regression", **more)


def phi(result: fp.Result) -> Tensor:
    return result.params["weight"][0]
