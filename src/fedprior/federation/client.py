"""The client's side on Flower: a ClientApp that answers with a Node."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedprior.algorithm import Algorithm
from fedprior.federation.node import Data, Node
from fedprior_node import flower


def client_app(algorithm: Algorithm, data: Data, model: nn.Module, **options: Any) -> flower.ClientApp:
    """A Flower ClientApp for the algorithm that was simulated.

    Flower starts a process for every message, which then imports PyTorch and loads the data again; for a process that
    stays, write `fedprior_node.resident_app("task:node")`, where `node()` in task.py returns a Node.

    Args:
        algorithm: the server's.
        data: the clients, or (partition, partitions) -> those of one node.
        model: the server's.
        options: the other fields of a Node: loss, state, device, threads.
    """
    node = Node(algorithm, data, model, **options)
    return flower.app(lambda blob, place, number: node.answer(blob, *place))
