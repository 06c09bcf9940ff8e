"""A Flower grid in this process: every message is answered at once by a ClientApp, and may be changed on its way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict  # pyright: ignore[reportMissingImports]
from flwr.serverapp import Grid  # pyright: ignore[reportMissingImports]
from flwr.supercore.task_identity import TaskIdentity  # pyright: ignore[reportMissingImports]

import fedprior as fp
from cases import classification_clients, pooled
from fedprior.federation import Settings, client_app, serve

CLIENTS = classification_clients((6, 5, 9, 4, 7, 8, 3))
MODEL = fp.models.mlp(4, (6,), 3)
TEST = pooled(classification_clients((30,)))
ROUNDS, COHORT, NODES = 4, 5, 3

Change = Callable[[int, Any, Any], Any]
"""(number of the message, request, reply) -> what the server gets instead; None for a reply that never comes."""


class LocalGrid(Grid):
    """Nodes 100, 101, ... with the partitions 0, 1, ..."""

    def __init__(self, app: Any, nodes: int, change: Change = lambda number, request, reply: reply) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # or Message() raises
        self.app, self.change, self.count, self.box = app, change, itertools.count(1), {}
        self.contexts: dict[int, Any] = {}
        for partition in range(nodes):
            self.add(100 + partition, partition, nodes)

    def add(self, node: int, partition: int, partitions: int) -> None:
        config = {"partition-id": partition, "num-partitions": partitions}
        self.contexts[node] = Context(
            run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={}, series_id=1
        )

    run = property(lambda self: None)

    def set_run(self, run_id: int) -> None: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def get_nodes(self) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Any) -> list[str]:
        sent = []
        for message in messages:
            number = next(self.count)
            message.metadata.__dict__["_message_id"] = f"m{number}"
            reply = self.app(message, self.contexts[message.metadata.dst_node_id])
            if (changed := self.change(number, message, reply)) is not None:
                self.box[f"m{number}"] = changed
            sent.append(f"m{number}")
        return sent

    def pull_messages(self, message_ids: Any) -> list[Any]:
        """The newest message first, so that no order is right by chance."""
        return [self.box.pop(i) for i in reversed(list(message_ids)) if i in self.box]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
        return self.pull_messages(self.push_messages(messages))


def own(partition: int, partitions: int) -> list[fp.Client]:
    return CLIENTS[partition::partitions]


def federated(algorithm: fp.Algorithm, folder: Path, change: Any = None, data: Any = own, **fields: Any) -> fp.Result:
    """The server's whole run; nodes keep their states in folder/states."""
    app = client_app(algorithm, data, MODEL, state=folder / "states")
    grid = LocalGrid(app, NODES, *([change] if change else []))
    fields = {"rounds": ROUNDS, "clients": len(CLIENTS), "cohort": COHORT, "nodes": NODES, "seconds": 0.3} | fields
    return serve(grid, algorithm, MODEL, Settings(out=str(folder / "out"), **fields), 7, TEST)


def simulated(algorithm: fp.Algorithm, **fields: Any) -> fp.Result:
    fields = {"rounds": ROUNDS, "cohort": COHORT, "test": TEST} | fields
    return fp.run(algorithm, MODEL, CLIENTS, engine=fp.engines.Sequential(1), **fields)
