"""Runs of two small models, and their bytes."""

from __future__ import annotations

from torch import nn

import fedprior as fp
from cases import classification_clients, image_clients
from fedprior import Client

IMAGES, VECTORS = image_clients(3, 24), classification_clients((20, 14, 9))
MODELS: dict[str, tuple[nn.Module, list[Client]]] = {
    "lenet": (fp.models.lenet((6, 8), 16, 4, 16), IMAGES),
    "mlp": (fp.models.mlp(4, (40, 30), 3), VECTORS),
}
ROUNDS = 9


def run(name: str, algorithm: fp.Algorithm, rounds: int = ROUNDS, **fields) -> fp.Result:
    model, clients = MODELS[name]
    return fp.run(algorithm, model, clients, rounds=rounds, **fields)


def total(result: fp.Result) -> int:
    return result.bytes_up + result.bytes_down
