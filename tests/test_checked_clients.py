"""All clients of a list or a partition are looked at before round one, whichever of them the first cohorts have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
from cases import classification_clients
from fedprior.data.population import Partition

CLIENTS = classification_clients((6, 7, 8, 5))
MODEL = fp.models.softmax(4, 3)


def partition(clients: Sequence[fp.Client]) -> Partition:
    """The same clients, cut out of one set of examples that lies in another order."""
    x, y = (torch.cat([getattr(c.train, field) for c in clients]) for field in ("x", "y"))
    order = torch.arange(len(y)).flip(0)
    offsets = torch.tensor([0, *(len(c.train) for c in clients)]).cumsum(0)
    return Partition(fp.Examples(x[order], y[order]), order, offsets, names=tuple(c.name for c in clients))


FORMS: dict[str, Callable[[Sequence[fp.Client]], fp.core.Population | Sequence[fp.Client]]] = {
    "list": list,
    "partition": partition,
}


def changed(index: int, change: Callable[[Tensor], Tensor]) -> list[fp.Client]:
    """The clients, one of them with other labels."""
    client = CLIENTS[index]
    other = replace(client, train=replace(client.train, y=change(client.train.y)))
    return [*CLIENTS[:index], other, *CLIENTS[index + 1 :]]


def emptied(*indices: int) -> list[fp.Client]:
    none = torch.tensor([], dtype=torch.int64)
    return [replace(c, train=c.train.take(none)) if c.index in indices else c for c in CLIENTS]


def go(form: str, clients: Sequence[fp.Client]) -> fp.Result:
    return fp.run(fp.fedavg(), MODEL, FORMS[form](clients), rounds=1, cohort=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", range(4))
def test_a_client_that_cannot_train_is_named(form: str, index: int) -> None:
    name, last = CLIENTS[index].name, torch.tensor([0] * (len(CLIENTS[index].train) - 1) + [1])
    cases = {
        f"1 of 4 clients have no training examples, the first is '{name}'.*if len": emptied(index),
        f"labels of .*client.* run from . to {2 + 7}, and the model has 3 outputs": changed(
            index, lambda y: 2 + 7 * last
        ),
        "labels of .*client.* run from -1 to .*3 outputs": changed(index, lambda y: y * (1 - last) - last),
    }
    for message, clients in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            go(form, clients)
        assert name in str(error.value) or (index == 0 and "the first client" in str(error.value))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_said_helps(form: str) -> None:
    """Without the empty clients, as the message advises, the run goes; clients as they were are accepted."""
    population = FORMS[form](emptied(1, 3))
    with pytest.raises(ValueError, match=f"2 of 4 clients have no training examples, the first is '{CLIENTS[1].name}'"):
        fp.run(fp.fedavg(), MODEL, population, rounds=1)
    full = [population[i] for i in range(4) if len(population[i].train)]
    assert [c.client for c in fp.run(fp.fedavg(), MODEL, full, rounds=1).history[0].clients] == [
        CLIENTS[0].name,
        CLIENTS[2].name,
    ]
    assert go(form, CLIENTS).history[0].clients


class Wrapped(nn.Module):
    """A model whose output is more than a tensor."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.model, self.wrap = MODEL, wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.model(x))


@pytest.mark.parametrize(("wrap", "kind"), [(lambda o: (o, o), "tuple"), (lambda o: {"logits": o}, "dict")])
def test_outputs_that_are_no_tensor_are_named(wrap: Callable[[Tensor], object], kind: str) -> None:
    with pytest.raises(ValueError, match=f"the model must give one tensor, and gives a {kind}"):
        fp.run(fp.fedavg(), Wrapped(wrap), CLIENTS, rounds=1)


def test_a_test_set_with_nan_is_refused() -> None:
    test = CLIENTS[0].train
    x = test.x.clone()
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match="x of the test examples has 1 NaN or infinite values"):
        fp.run(fp.fedavg(), MODEL, CLIENTS, rounds=1, test=replace(test, x=x))


@pytest.mark.parametrize(
    "scheme", [fp.data.iid, fp.data.shards, lambda e, n: fp.data.dirichlet(e, n, 1.0), fp.data.by_key]
)
def test_what_is_dealt_out_must_be_examples(scheme: Callable[..., Partition]) -> None:
    with pytest.raises(TypeError, match=r"such as fedprior.data.from_arrays\(x, y\); got tuple"):
        scheme((CLIENTS[0].train.x, CLIENTS[0].train.y), 2)
