"""The client's side on Flower: a ClientApp that answers with a Node."""

from __future__ import annotations

from typing import Any

from flwr.app import Context, Message  # pyright: ignore[reportMissingImports]
from flwr.clientapp import ClientApp  # pyright: ignore[reportMissingImports]
from torch import nn

from fedprior.algorithm import Algorithm
from fedprior.federation.node import Data, Node
from fedprior_node import mail


def client_app(algorithm: Algorithm, data: Data, model: nn.Module, **options: Any) -> ClientApp:
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
    app = ClientApp()

    @app.train("fedprior")
    def answer(message: Message, context: Context) -> Message:
        return mail.reply(message, node.answer(mail.blob(message), *mail.place(context)))

    return app
