"""Groups of coupled units: closing a unit's gate is the same as building the model without it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fedprior as fp
from cases import conv_net, count_alive, everywhere, redraw
from coupled_nets import Branches, CharLSTM, OneLayerBlock, Residual, norm_net
from fedprior import Params, structure
from fedprior.objective import Objective
from fedprior.rng import generator


@dataclass(frozen=True)
class Case:
    """A model by the widths of its groups, and the shape of its input.

    Attributes:
        build: widths -> model.
        slices: parameter -> (group of its rows, group of its columns), -1 for none.
    """

    name: str
    build: Callable[..., nn.Module]
    widths: tuple[int, ...]
    shape: tuple[int, ...]
    slices: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        return self.name

    def model(self, widths: tuple[int, ...] | None = None) -> nn.Module:
        model = redraw(self.build(*(widths or self.widths)).double(), 1).eval()
        with torch.no_grad():
            for i, buffer in enumerate(b for b in model.buffers() if b.is_floating_point()):
                buffer.copy_(1 + torch.rand(buffer.shape, generator=generator(i, "buffer"), dtype=torch.float64))
        return model

    def x(self) -> Tensor:
        return torch.randn(5, *self.shape, generator=generator(0, "x"), dtype=torch.float64)

    def smaller(self, params: Params, keep: tuple[list[int], ...]) -> tuple[nn.Module, Params]:
        """The model built with fewer units, and the rows and columns of the parameters that it still has."""
        model = self.model(tuple(len(k) for k in keep))
        sliced = {}
        for name, value in params.items():
            for dim, group in enumerate(self.slices.get(name, ())[: value.ndim]):
                if group >= 0:
                    block = value.shape[dim] // self.widths[group]  # more than 1 after a flattening
                    rows = [unit * block + i for unit in keep[group] for i in range(block)]
                    value = value.index_select(dim, torch.tensor(rows))
            sliced[name] = value
        return model, sliced


def layer(name: str, rows: int, columns: int = -1) -> dict[str, tuple[int, int]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows, -1)}


def norm(name: str, rows: int) -> dict[str, tuple[int, int]]:
    return {f"{name}.{k}": (rows, -1) for k in ("weight", "bias", "running_mean", "running_var")}


def lenet(first: int, second: int, hidden: int) -> nn.Module:
    return fp.models.lenet((first, second), hidden, 3, 20)


def mlp(first: int, second: int) -> nn.Module:
    return fp.models.mlp(4, (first, second), 2)


CASES = [
    Case("mlp", mlp, (4, 3), (4,), layer("1", 0) | layer("3", 1, 0) | layer("5", -1, 1)),
    Case(
        "lenet",
        lenet,
        (3, 4, 5),
        (1, 20, 20),
        layer("0", 0) | layer("3", 1, 0) | layer("7", 2, 1) | layer("9", -1, 2),
    ),
    Case(
        "batch-norm",
        norm_net,
        (4, 3),
        (1, 8, 8),
        layer("0", 0) | norm("1", 0) | layer("3", 1, 0) | norm("4", 1) | layer("8", -1, 1),
    ),
    Case(
        "residual",
        Residual,
        (4, 3),
        (1, 8, 8),
        layer("stem", 0) | layer("conv1", 1, 0) | layer("conv2", 0, 1) | layer("head", -1, 0),
    ),
    Case("one-layer-block", OneLayerBlock, (3,), (4,), layer("a", 0) | layer("b", 0, 0) | layer("head", -1, 0)),
]


def by_width(case: Case, found: tuple[structure.Group, ...]) -> list[structure.Group]:
    """The found groups in the order of the case's widths: by the parameters whose rows they hold."""
    order = []
    for index in range(len(case.widths)):
        rows = {name for name, (row, _) in case.slices.items() if row == index and name.endswith("weight")}
        order.append(next(g for g in found if rows <= {m.name for m in g.members if m.out}))
    return order


def subsets(width: int) -> list[list[int]]:
    """All units, one missing at each end, one left."""
    units = list(range(width))
    return [units, units[1:], units[:-1], units[1:2]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_closed_gate_is_a_smaller_model(case: Case) -> None:
    model, x = case.model(), case.x()
    found = by_width(case, structure.groups(model, x))
    assert [g.units for g in found] == list(case.widths) and len(found) == len(structure.groups(model, x))
    params = Objective(model).params()
    for keep in itertools.product(*map(subsets, case.widths)):
        gate = {g.name: torch.tensor([float(i in k) for i in range(g.units)]) for g, k in zip(found, keep, strict=True)}
        closed = functional_call(model, structure.close_gates(found, gate, params), (x,))
        small, sliced = case.smaller(params, keep)
        assert torch.allclose(closed, functional_call(small, sliced, (x,)), rtol=0, atol=1e-12)
        z = everywhere(structure.alive(found, gate, params), params)
        trained = dict(small.named_parameters())
        left = count_alive({k: z[k] for k in trained}, {k: params[k] for k in trained})
        assert left == sum(p.numel() for p in trained.values())
        masked = {k: v * z[k] for k, v in params.items()}
        assert torch.allclose(closed, functional_call(model, masked, (x,)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_looking_at_a_model_does_not_change_it(case: Case) -> None:
    model, state = case.model().train(), torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    structure.groups(model, case.x())
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert structure.groups(model, case.x()) == structure.groups(model, case.x())


def test_groups_of_concatenated_layers() -> None:
    """a and b hold 3 and 2 of the 5 columns of c; a closed unit still has no effect on the output."""
    model = redraw(Branches().double()).eval()
    x = torch.randn(2, 1, 8, 8, generator=generator(0, "x"), dtype=torch.float64)
    found = {g.name: g for g in structure.groups(model, x)}
    params = Objective(model).params()
    gate = {name: torch.ones(g.units) for name, g in found.items()}
    assert count_alive(structure.alive(found.values(), gate, params), params) == sum(p.numel() for p in params.values())
    gate["b"][0] = 0
    z = everywhere(structure.alive(found.values(), gate, params), params)
    assert not z["c.weight"][:, 3].any() and z["c.weight"][:, [0, 1, 2, 4]].all()
    without = {k: v * z[k] for k, v in params.items()}
    closed = functional_call(model, structure.close_gates(found.values(), gate, params), (x,))
    assert torch.allclose(closed, functional_call(model, without, (x,)), rtol=0, atol=1e-12)
    assert not torch.allclose(closed, model(x))


def characters(heads: int = 3, hidden: int = 5, every: bool = True) -> nn.Module:
    return fp.models.char_transformer(7, 6, 8, heads, 4, depth=1, hidden=hidden, every=every).double()


@pytest.mark.parametrize(("head", "neuron"), [(0, 4), (2, 0), (1, 2)])
def test_a_closed_head_is_a_transformer_without_it(head: int, neuron: int) -> None:
    """A head is 4 rows of queries, keys and values, and 4 columns of what reads them."""
    model, x = redraw(characters()), torch.randint(7, (2, 6), generator=generator(0, "x"))
    found = {g.name: g for g in structure.groups(model, x)}
    params, block = Objective(model).params(), "blocks.0."
    gate = {g: torch.ones(group.units, dtype=torch.float64) for g, group in found.items()}
    gate[f"{block}attention.value"][head] = gate[f"{block}first"][neuron] = 0
    rows = [i for i in range(12) if i // 4 != head]
    sliced = dict(params)
    for layer in ("query", "key", "value"):
        for name in (f"{block}attention.{layer}.weight", f"{block}attention.{layer}.bias"):
            sliced[name] = params[name][rows]
    sliced[f"{block}attention.out.weight"] = params[f"{block}attention.out.weight"][:, rows]
    neurons = [i for i in range(5) if i != neuron]
    for name in (f"{block}first.weight", f"{block}first.bias"):
        sliced[name] = params[name][neurons]
    sliced[f"{block}second.weight"] = params[f"{block}second.weight"][:, neurons]
    small = functional_call(characters(2, 4), sliced, (x,))
    assert small.shape == (2, 6, 7) and not torch.allclose(small, functional_call(model, params, (x,)))
    closed = structure.close_gates(tuple(found.values()), gate, params)
    assert torch.allclose(functional_call(model, closed, (x,)), small, rtol=0, atol=1e-12)


def test_a_character_is_predicted_from_those_before_it() -> None:
    """Logits depend on a position's own character and on earlier ones; without `every` they are the last ones."""
    model, x = redraw(characters()), torch.randint(6, (2, 6), generator=generator(1, "x"))
    logits = model(x)
    for position in range(6):
        changed = x.clone()
        changed[:, position] = 6
        difference = (model(changed) - logits).abs().amax((0, 2))
        same = (difference < 1e-12).tolist()
        assert same == [p < position for p in range(6)]
    last = characters(every=False)
    last.load_state_dict(model.state_dict())
    assert torch.equal(last(x), logits[:, -1])


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (fp.models.softmax(), torch.zeros(1, 784)),
        (fp.models.char_gru(8), torch.zeros(1, 5, dtype=torch.int64)),
        (CharLSTM(hidden=False), torch.zeros(1, 5, dtype=torch.int64)),
    ],
    ids=["softmax", "gru", "lstm"],
)
def test_a_model_without_units_is_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"no unit of {type(model).__name__} can be gated.*Gaussian"):
        structure.groups(model, x)


def test_output_units_are_never_gated() -> None:
    for case in CASES:
        model = case.model()
        last = list(model.state_dict())[-1].split(".")[0]
        held = {m.name for g in structure.groups(model, case.x()) for m in g.members if m.out}
        assert not any(name.startswith(f"{last}.") for name in held), case.name


def test_layers_of_other_types_stay_dense() -> None:
    """A grouped convolution and a layer norm: their groups are left whole, the rest is found."""
    model = redraw(
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    )
    found = structure.groups(model, torch.zeros(1, 4, dtype=torch.float64))
    assert [g.name for g in found] == ["2"]
    net = conv_net()
    assert len(structure.groups(net, torch.zeros(1, 1, 8, 8, dtype=torch.float64))) == 3


class WithInput(nn.Module):
    """layer(x) + x -> second -> head: the layer's units are those of the input."""

    def __init__(self, layer: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.layer, self.second, self.head = layer, second, nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second((self.layer(x) + x).relu()).relu().flatten(1))


AT_THE_INPUT = {
    "depthwise": (
        nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 5, 1), nn.Flatten(), nn.LazyLinear(2)),
        (3, 8, 8),
        "2",
    ),
    "a convolution and its input": (
        WithInput(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 5, 3)),
        (3, 8, 8),
        "second",
    ),
    "a dense layer and its input": (WithInput(nn.Linear(4, 4), nn.Linear(4, 5)), (4,), "second"),
    "a dense layer and its input, in sequences": (WithInput(nn.Linear(4, 4), nn.Linear(4, 5)), (1, 4), "second"),
}


@pytest.mark.parametrize("name", AT_THE_INPUT)
def test_units_of_the_input_are_never_cut(name: str) -> None:
    """The input has them, whatever the model has lost."""
    model, shape, left = AT_THE_INPUT[name]
    x = torch.randn(2, *shape, generator=generator(0, "x"))
    model(x)
    assert [(g.name, g.units) for g in structure.groups(model, x)] == [(left, 5)]
