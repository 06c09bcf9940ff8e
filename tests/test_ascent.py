"""What makes E-steps fast changes nothing: a model that holds its weights, plain descent."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import classification_clients, equal
from fedprior.inference.ascent import Descent, batch_sizes, batches
from fedprior.objective import Objective
from fedprior.rng import generator


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


MODELS = {
    "lenet": (lambda: fp.models.lenet((3, 4), 6), (5, 1, 28, 28)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), (5, 4)),
    "tied": (Tied, (5, 4)),
    "recurrent": (lambda: fp.models.char_gru(7, 3, 5), (5, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_holds_its_weights_computes_the_same(name: str) -> None:
    make, shape = MODELS[name]
    rng = generator(0, name)
    x = torch.randint(7, shape, generator=rng) if name == "recurrent" else torch.randn(shape, generator=rng)
    model = make()
    objective, before = Objective(model), copy.deepcopy(model.state_dict())
    start = {k: v + 0.1 for k, v in objective.params().items()}
    found = []
    for holds in (False, True):
        phi = {k: v.clone().requires_grad_(k in objective.trainable) for k, v in start.items()}
        objective.train()
        if holds:
            with objective.holding(phi):
                outputs = objective.outputs(phi, x)
        else:
            outputs = objective.outputs(phi, x)
        outputs.square().sum().backward()
        grads = {k: phi[k].grad for k in objective.trainable}
        found.append(({k: v.detach() for k, v in phi.items()}, {**grads, "outputs": outputs.detach()}))
    assert equal(found[0][0], found[1][0])
    for plain, held in zip(*(side[1].values() for side in found), strict=True):  # some layers add in another order
        torch.testing.assert_close(held, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
    assert (name != "batch norm") == equal(found[1][0], start)  # running moments move
    assert equal(dict(objective.model.state_dict()), dict(before))


def test_a_model_is_as_it_was_after_an_exception() -> None:
    objective = Objective(fp.models.mlp(4, (3,), 2))
    before = objective.params()
    with pytest.raises(RuntimeError, match="stop"), objective.holding({k: v + 1 for k, v in before.items()}):
        raise RuntimeError("stop")
    assert equal(objective.params(), before)
    other = {k: v + 2 for k, v in before.items()}
    x = torch.ones(1, 4)
    assert torch.equal(objective.outputs(other, x), torch.func.functional_call(objective.model, other, (x,)))


def test_plain_descent_is_sgd() -> None:
    rng = generator(0, "descent")
    start, grads = torch.randn(4, 3, generator=rng), [torch.randn(4, 3, generator=rng) for _ in range(3)]
    found = []
    for make in (lambda p: Descent(p, 0.3), lambda p: torch.optim.SGD(p, lr=0.3)):
        value, frozen = start.clone().requires_grad_(), torch.ones(2, requires_grad=True)
        optimizer = make([value, frozen])
        for grad in grads:
            optimizer.zero_grad()
            assert value.grad is None
            value.grad = grad.clone()
            optimizer.step()
        found.append(value.detach())
        assert torch.equal(frozen, torch.ones(2))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("examples", "size", "smallest", "expected"),
    [
        (7, 3, 1, [3, 3, 1]),
        (7, 3, 2, [3, 4]),
        (8, 3, 2, [3, 3, 2]),
        (5, None, 2, [5]),
        (1, None, 2, [2]),
        (1, 1, 2, [2]),
        (2, 10, 5, [5]),
    ],
)
def test_batches_hold_every_example_equally_often(
    examples: int, size: int | None, smallest: int, expected: list[int]
) -> None:
    """Once where there are `smallest`; else with a difference of one at most. Labels stay with their examples."""
    data = fp.Examples(torch.arange(examples)[:, None].float(), torch.arange(examples))
    found = list(batches(data, 3, size, generator(0, "order"), smallest))
    assert [len(b) for b in found] == 3 * expected == 3 * batch_sizes(examples, size, smallest)
    assert all(torch.equal(b.x[:, 0], b.y.float()) for b in found)
    for epoch in torch.cat([b.y for b in found]).split(sum(expected)):
        counts = torch.bincount(epoch, minlength=examples)
        assert counts.max() - counts.min() <= (sum(expected) > examples)


def test_batch_norm_and_a_last_batch_or_a_client_of_one() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    clients = classification_clients((21, 11, 1))
    for algorithm in (
        fp.fedavg(batch_size=10),
        fp.scaffold(batch_size=10),
        fp.fedsparse(batch_size=10, density=0.5),
        fp.fedsparse(batch_size=10, lambda_0=0.1),
    ):
        result = fp.run(algorithm, net, clients, rounds=1)
        assert "warning" not in result.summary() and math.isfinite(result.personalised(clients)[2]["after_nats"])
