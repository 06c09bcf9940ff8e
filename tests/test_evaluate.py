"""Evaluation in batches: what one pass of PyTorch's own layers over all examples gives, whoever's examples they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
from cases import redraw
from fedprior import metrics
from fedprior.metrics import evaluate, evaluate_clients
from fedprior.objective import Objective
from fedprior.posteriors import Predictive
from fedprior.rng import generator
from fedprior.slim import Cut
from fedprior.structure import groups

CLASSES = 3


class Tied(nn.Module):
    """The same weights twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


class GRU(nn.Module):
    """The last state of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


def convolutions(*norm: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(1, 6, 3), *norm, nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(36, CLASSES))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "softmax": (lambda: nn.Linear(6, CLASSES), (6,)),
    "mlp": (lambda: fp.models.mlp(6, (5,), CLASSES), (6,)),
    "convolutions": (convolutions, (1, 12, 12)),
    "batch norm": (lambda: convolutions(nn.BatchNorm2d(6)), (1, 12, 12)),
    "group norm": (lambda: convolutions(nn.GroupNorm(2, 6)), (1, 12, 12)),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.9), nn.Linear(9, CLASSES)), (6,)),
    "gru": (GRU, (4, 2)),
    "tied": (Tied, (6,)),
}


def objective_of(name: str) -> tuple[Objective, tuple[int, ...]]:
    """Moments of norms are other than 0 and 1, and the model is left in training mode."""
    make, shape = MODELS[name]
    model = redraw(make().double())
    for moment in model.buffers():
        if moment.is_floating_point():
            moment.copy_(0.5 + torch.rand(moment.shape, generator=generator(1, name), dtype=torch.float64))
    return Objective(model), shape


def drawn(seed: int, size: int, shape: Sequence[int]) -> fp.Examples:
    rng = generator(seed, "examples")
    x = torch.randn(size, *shape, generator=rng, dtype=torch.float64)
    return fp.Examples(x, torch.randint(CLASSES, (size,), generator=rng))


def in_one_pass(objective: Objective, weights: Sequence[float], phis: Sequence[fp.Params], data: fp.Examples) -> Any:
    """Means of a mixture of PyTorch's modules, each example's probability written out."""
    with torch.no_grad():
        p = torch.stack([w * objective.module(phi)(data.x).softmax(1) for w, phi in zip(weights, phis, strict=True)])
    p = p.sum(0)
    nats = -p[torch.arange(len(data)), data.y].log().mean()
    return {"nats": float(nats), "accuracy": float((p.argmax(1) == data.y).double().mean())}


def moved(phi: fp.Params) -> fp.Params:
    return {k: 0.7 * v + 0.1 for k, v in phi.items()}


@pytest.mark.parametrize("values", [1, 300, 2**19])
@pytest.mark.parametrize("name", MODELS)
def test_batches_are_one_pass_of_pytorch(name: str, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a point and of a mixture, in large batches, small ones, and example by example."""
    monkeypatch.setattr(metrics, "VALUES", values)
    objective, shape = objective_of(name)
    data, phi = drawn(0, 113, shape), objective.params()
    before = {k: v.clone() for k, v in objective.model.state_dict().items()}
    got = evaluate(objective, phi, data).means()
    assert got == pytest.approx(in_one_pass(objective, [1.0], [phi], data), rel=1e-10)
    models = [phi, moved(phi)]
    mixed = evaluate(objective, Predictive((0.3, 0.7), tuple(models)), data, batch_size=40).means()
    assert mixed == pytest.approx(in_one_pass(objective, [0.3, 0.7], models, data), rel=1e-10)
    after = objective.model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_smaller_model() -> None:
    """Of what a cut leaves."""
    model = redraw(fp.models.mlp(6, (8,), CLASSES).double())
    [group] = found = groups(model, torch.zeros(1, 6, dtype=torch.float64))
    whole = Objective(model)
    cut = Cut.of(tuple(found), {group.name: torch.tensor([0.0, 1, 1, 0, 1, 0, 1, 1], dtype=torch.float64)})
    small, phi, data = whole.cut(cut), cut.gather(whole.params()), drawn(0, 113, (6,))
    assert small.count(phi) < whole.count(whole.params())
    assert evaluate(small, phi, data).means() == pytest.approx(in_one_pass(small, [1.0], [phi], data), rel=1e-10)


class Counting(nn.Module):
    """Outputs from an inner layer of `width` values an example; notes how many examples come at a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, width), nn.Linear(width, CLASSES)
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.head(self.inner(x))


@pytest.mark.parametrize("width", [2, 5000, 2**14, 2**20])
def test_what_a_layer_gives_bounds_a_batch(width: int) -> None:
    """All examples once; batches after the first as large as `MOST` and `VALUES` allow, and of one at the least."""
    objective, data = Objective(Counting(width)), drawn(0, 1234 if width < 2**20 else 60, (6,))
    data = fp.Examples(data.x.float(), data.y)
    sizes: Any = objective.model.sizes
    evaluate(objective, objective.params(), data)
    best = max(1, min(metrics.MOST, math.floor(metrics.VALUES / width)))
    assert sum(sizes) == len(data) and sizes[0] == metrics.FIRST
    assert all(size == best for size in sizes[1:-1]) and sizes[-1] <= best


def test_a_failed_evaluation_leaves_the_model_as_it_was() -> None:
    """No watchers, no faster forms, its own values, also where the model itself fails in the middle of the first."""

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("torn")

    model = nn.Sequential(nn.Conv2d(1, 2, 3), Failing())
    objective = Objective(model.double())
    phi = moved(objective.params())
    with pytest.raises(ArithmeticError):
        evaluate(objective, phi, drawn(0, 5, (1, 6, 6)))
    for layer in objective.model.modules():
        assert not layer._forward_hooks and "forward" not in vars(layer)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in objective.model.state_dict().items())


def clients_of(sizes: Sequence[int], shape: Sequence[int]) -> list[fp.Client]:
    """Every third one has no held-out examples, of which half have an empty set."""
    some = []
    for index, size in enumerate(sizes):
        held = [drawn(100 + index, size, shape), None, drawn(0, 0, shape)][0 if index % 3 else 1 + index % 2]
        some.append(fp.Client(index, f"client-{index}", drawn(index, size, shape), held))
    return some


@pytest.mark.parametrize("together", [1, 40, 2**20])
@pytest.mark.parametrize("name", MODELS)
def test_a_client_s_row_is_its_own(name: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged clients, alone and in one go, against each one's examples in one pass."""
    monkeypatch.setattr(metrics, "TOGETHER", together)
    objective, shape = objective_of(name)
    clients, phi = clients_of((7, 1, 60, 3, 12, 2, 5), shape), objective.params()
    rows = evaluate_clients(objective, phi, clients)
    assert [row["client"] for row in rows] == [c.name for c in clients]
    for row, client in zip(rows, clients, strict=True):
        data = client.held_out if client.index % 3 else client.train
        assert data is not None
        assert (row["examples"], row["on"]) == (len(data), "held_out" if client.index % 3 else "training")
        want = in_one_pass(objective, [1.0], [phi], data)
        assert {k: row[k] for k in want} == pytest.approx(want, rel=1e-10)


def test_small_clients_share_batches_if_their_examples_are_of_one_kind() -> None:
    """Forty clients of one kind in two calls; another window in between is no neighbour."""
    objective = Objective(Counting(2).double())
    alike = clients_of([25] * 40, (6,))
    evaluate_clients(objective, objective.params(), alike)
    sizes: Any = objective.model.sizes
    assert sizes == [metrics.FIRST, 1000 - metrics.FIRST]

    gru, _ = objective_of("gru")
    mixed = [*clients_of((5, 5), (4, 2)), *clients_of((5,), (7, 2)), *clients_of((5,), (4, 2))]
    rows = evaluate_clients(gru, gru.params(), mixed)
    for row, client in zip(rows, mixed, strict=True):
        data = client.held_out or client.train
        assert row["nats"] == pytest.approx(in_one_pass(gru, [1.0], [gru.params()], data)["nats"], rel=1e-10)


def test_clients_share_batches_up_to_a_number_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven of 25 examples with room for three at a time, then one that is larger than the room."""
    monkeypatch.setattr(metrics, "TOGETHER", 3 * 25 * 6)
    objective = Objective(Counting(2).double())
    evaluate_clients(objective, objective.params(), clients_of([25] * 7 + [80], (6,)))
    sizes: Any = objective.model.sizes
    assert metrics.FIRST == 50 and sizes == [50, 25, 50, 25, 25, 50, 30]


def test_clients_with_other_targets_share_no_batch() -> None:
    """Inputs alike, and targets of one number and of two."""

    def squares(outputs: Tensor, y: Tensor) -> Tensor:
        return -(outputs[:, : y.shape[1]] - y).square().sum(1)

    objective = Objective(nn.Linear(6, CLASSES).double(), fp.Loss(squares))
    phi, clients = objective.params(), []
    for index, numbers in enumerate((1, 2, 2, 1)):
        x = drawn(index, 5, (6,)).x
        clients.append(fp.Client(index, f"client-{index}", fp.Examples(x, x[:, :numbers])))
    for row, client in zip(evaluate_clients(objective, phi, clients), clients, strict=True):
        want = -squares(nn.functional.linear(client.train.x, phi["weight"], phi["bias"]), client.train.y)
        assert row["nats"] == pytest.approx(float(want.mean()), rel=1e-10)


def test_a_client_without_any_example_is_named() -> None:
    empty = fp.Client(3, "client-3", drawn(0, 0, (6,)))
    objective, _ = objective_of("softmax")
    with pytest.raises(ValueError, match="'client-3': it has no examples"):
        evaluate_clients(objective, objective.params(), [*clients_of((4, 4), (6,)), empty])
