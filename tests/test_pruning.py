"""Magnitude pruning: the density asked for, the weakest units first, and the outputs of the masked model."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

import fedprior as fp
from fedprior import structure, tree
from fedprior.metrics import evaluate
from fedprior.objective import Objective
from fedprior.pruning import prune, weakest_first
from fedprior.rng import generator
from fedprior.slim import Cut, slim
from test_slim import MODELS, setting


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def one_by_one(name: str) -> tuple[nn.Module, torch.Tensor, list[tuple[Cut, nn.Module]]]:
    """A model, inputs, and the models without its 0, 1, 2, ... weakest units."""
    model, x, cut, _ = setting(name)
    order = weakest_first(cut.groups, dict(model.named_parameters()))
    smaller = []
    for n in range(len(order) + 1):
        gate = {g.name: torch.ones(g.units).double() for g in cut.groups}
        for group, unit in order[:n]:
            gate[group][unit] = 0.0
        left = Cut.of(cut.groups, gate)
        smaller.append((left, slim(model, left)))
    return model, x, smaller


@pytest.mark.parametrize("name", MODELS)
def test_as_many_units_go_as_the_density_needs(name: str) -> None:
    """The first of the models without 0, 1, 2, ... units that is small enough; never a whole group."""
    model, x, smaller = one_by_one(name)
    least = size(smaller[-1][1]) / size(model)
    assert all(len(kept) == 1 for kept in smaller[-1][0].kept.values()) and least < 1
    for density in (least, least + 0.3 * (1 - least), least + 0.8 * (1 - least), 1.0):
        want = next(m for _, m in smaller if size(m) / size(model) <= density)
        got = prune(model, density, x).state_dict()
        assert got.keys() == want.state_dict().keys()
        assert all(torch.equal(v, got[k]) for k, v in want.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_masked_model(name: str) -> None:
    model, x, smaller = one_by_one(name)
    cut, want = smaller[len(smaller) // 2]
    got = prune(model, size(want) / size(model), x)
    gate = cut.all_units({g: torch.ones(len(k)).double() for g, k in cut.kept.items()})
    whole, params = Objective(model), Objective(model).params()
    masked = whole.module(structure.apply(structure.alive(cut.groups, gate, params), params))
    assert cut.removed > 0
    assert torch.allclose(got.eval()(x), masked(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_density_1_is_the_identity(name: str) -> None:
    model, x, _, _ = setting(name)
    before = copy.deepcopy(model.state_dict())
    same = prune(model, 1.0, x)
    assert same is not model and all(torch.equal(v, same.state_dict()[k]) for k, v in before.items())
    assert torch.equal(same.eval()(x), model.eval()(x))
    prune(model, 0.9, x)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_the_smallest_norms_go_first() -> None:
    """Rows and biases of a two-layer MLP, relative to the layer's mean, by a plain loop."""
    model, x, cut, _ = setting("mlp")
    scores = {}
    for layer in (1, 3):
        weight, bias = model[layer].weight.tolist(), model[layer].bias.tolist()
        norms = [sum(w * w for w in [*row, b]) ** 0.5 for row, b in zip(weight, bias, strict=True)]
        scores |= {(str(layer), u): n / (sum(norms) / len(norms)) for u, n in enumerate(norms)}
    best = {max((k for k in scores if k[0] == layer), key=lambda k: scores[k]) for layer in "13"}
    want = sorted((k for k in scores if k not in best), key=lambda k: scores[k])
    assert weakest_first(cut.groups, dict(model.named_parameters())) == want
    for removed in (1, 4, len(want)):
        left = [[u for u in range(n) if (layer, u) not in want[:removed]] for layer, n in (("1", 7), ("3", 6))]
        a, b = (len(units) for units in left)
        small = prune(model, (12 * a + a + a * b + b + b * 3 + 3) / size(model), x)
        assert torch.equal(small[1].weight, model[1].weight[left[0]])
        assert torch.equal(small[3].weight, model[3].weight[left[1]][:, left[0]])


def test_the_scale_of_a_layer_does_not_matter() -> None:
    """ReLU networks compute the same with one layer times 1000 and the next over 1000."""
    model, x, _, _ = setting("mlp")
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for p in scaled[1].parameters():
            p *= 1000
        scaled[3].weight /= 1000
        scaled[3].bias.zero_()
        model[3].bias.zero_()
    a, b = prune(model, 0.5, x), prune(scaled, 0.5, x)
    assert torch.equal(a[3].bias, b[3].bias) and torch.allclose(a(x), b(x), atol=1e-9)


def test_units_without_any_weight() -> None:
    """Zeros have no mean to be compared with; they go like the weakest."""
    model = fp.models.mlp(4, (3, 3), 2)
    with torch.no_grad():
        for p in model[1].parameters():
            p.zero_()
    small = prune(model, 0.6, torch.zeros(1, 4))
    assert small[1].out_features == 1 and small[3].out_features > 1


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, float("nan")])
def test_a_density_is_a_fraction(density: float) -> None:
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        prune(fp.models.mlp(4, (3,), 2), density, torch.zeros(1, 4))


def test_too_small_a_density_names_the_smallest() -> None:
    """4-1-2: 5 + 4 parameters of 4-3-2's 15 + 8."""
    model, x = fp.models.mlp(4, (3,), 2), torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"at most 2 of 23 parameters.* have 9: ask for density >= ") as refused:
        prune(model, 0.1, x)
    assert size(prune(model, 9 / 23, x)) == size(prune(model, float(str(refused.value).split()[-1]), x)) == 9


def test_a_large_model_is_pruned_in_no_time() -> None:
    """570 units; processor time, so that neighbours do not matter."""
    model, x = fp.models.lenet(), torch.zeros(1, 1, 28, 28)
    started = time.process_time()
    small = prune(model, 0.1, x)
    assert time.process_time() - started < 2
    assert 0.095 < size(small) / size(model) <= 0.1


def test_prune_a_run_and_fine_tune() -> None:
    """The slim module is a model like any other: it is evaluated, and trained again."""
    train, test = fp.data.load("digits")
    clients = fp.data.iid(train, 8, seed=0)
    algorithm = fp.fedavg(lr=0.1, epochs=2)
    dense = fp.run(algorithm, fp.models.mlp(64, (40, 40)), clients, rounds=10, test=test)
    small = prune(dense.model(), 0.25, test.x)
    pruned = evaluate(Objective(small), Objective(small).params(), test).means()["accuracy"]
    tuned = fp.run(algorithm, small, clients, rounds=10, test=test)
    assert tuned.parameters == size(small) <= 0.25 * dense.parameters
    assert tuned.bytes_up < 0.3 * dense.bytes_up
    assert tuned.accuracy > pruned + 0.05
    assert tuned.accuracy > dense.accuracy - 0.05
    assert tree.size(dict(tuned.model().named_parameters())) == size(small)


def test_a_model_that_is_slim_already() -> None:
    model, x = fp.models.lenet((6, 8), 20), torch.randn(3, 1, 28, 28, generator=generator(0, "x"))
    once = prune(model, 0.5, x)
    twice = prune(once, 0.5, x)
    assert size(twice) <= 0.5 * size(once) and twice(x).shape == (3, 10)
