"""One row of benchmarks/engines.py in pfl (github.com/apple/pfl-research): milliseconds of each round, as JSON.

    python pfl_side.py ROW ROUNDS                                              one process
    python -m torch.distributed.run --nproc_per_node 2 pfl_side.py ROW ROUNDS  pfl's own way to use two cores

FederatedAveraging with its WeightByDatapoints, one local epoch, central SGD with rate 1; pfl evaluates in
round 0 alone.
"""

from __future__ import annotations

import json
import sys
import time

import engines
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module as ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from fedprior.rng import generator


class Model(nn.Module):
    """The row's network, with the methods that pfl asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        return {"examples": Weighted(len(x), 1)}


class Clock(TrainingProcessCallback):
    """Milliseconds between the ends of rounds."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.last = time.perf_counter()

    def after_central_iteration(self, *args: object, **fields: object) -> tuple[bool, Metrics]:
        now = time.perf_counter()
        self.times.append(1000 * (now - self.last))
        self.last = now
        return False, Metrics()


def main(name: str, rounds: int) -> None:
    torch.set_num_threads(1)
    row = engines.ROWS[name]
    clients = row.clients("cpu")

    def make(index: int) -> Dataset:  # pfl takes batches in the order of the data: shuffled here
        train = clients[index].train
        order = torch.randperm(len(train), generator=generator(0, index))
        return Dataset([train.x[order], train.y[order]], user_id=str(index))

    data = FederatedDataset(make, get_user_sampler("minimize_reuse", list(range(len(clients)))))
    net = Model(row.model()).train()
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, evaluation_frequency=rounds, train_cohort_size=row.cohort, val_cohort_size=None),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=engines.LR, local_batch_size=row.batch, local_max_grad_norm=None
        ),
        NNEvalHyperParams(local_batch_size=None),
        [clock],
        send_metrics_to_platform=False,
    )
    if ops().distributed.global_rank == 0:
        print(json.dumps(clock.times), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
