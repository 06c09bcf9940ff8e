"""One row of benchmarks/engines.py in Flower's simulation (flower.ai, with Ray): milliseconds of each round, as JSON.

    python flower_side.py ROW ROUNDS

ServerApp with its FedAvg, a ClientApp that trains as Flower's PyTorch quickstart does, one virtual node a client, one
core an actor; no evaluation but an empty one on the server, which reads the clock.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from functools import cache
from typing import Any

import engines
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedprior.core import Population
from fedprior.rng import generator

client_app = ClientApp()


@cache
def parts(name: str) -> tuple[torch.nn.Module, Population]:
    """The model and the population, once a process."""
    torch.set_num_threads(1)
    row = engines.ROWS[name]
    return row.model(), row.clients("cpu")


@client_app.train()
def train(message: Message, context: Context) -> Message:
    name, index = os.environ["ROW"], int(context.node_config["partition-id"])
    model, clients = parts(name)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = clients[index].train
    optimizer = torch.optim.SGD(model.parameters(), lr=engines.LR)
    model.train()
    for batch in torch.randperm(len(data), generator=generator(0, index)).split(engines.ROWS[name].batch):
        optimizer.zero_grad()
        F.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
        optimizer.step()
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(data)}),
    }
    return Message(content=RecordDict(content), reply_to=message)


def main(name: str, rounds: int) -> None:
    os.environ["ROW"] = name
    row = engines.ROWS[name]
    clients = len(row.clients("cpu"))
    server_app, ends = ServerApp(), []

    def clock(number: int, arrays: ArrayRecord) -> None:
        ends.append(time.perf_counter())  # of rounds 0 (before the first), 1, 2, ...

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=row.cohort / clients,
            fraction_evaluate=0.0,
            min_train_nodes=row.cohort,
            min_available_nodes=clients,
        )
        arrays = ArrayRecord(row.model().state_dict())
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds, evaluate_fn=clock)

    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server_app, client_app, clients, backend_config={"client_resources": resources})
    times = [1000 * (b - a) for a, b in itertools.pairwise(ends)]
    print(json.dumps(times), flush=True)


if __name__ == "__main__":
    import flower_side  # by name: Ray's processes import it, and have its cache for their lifetime

    flower_side.main(sys.argv[1], int(sys.argv[2]))
