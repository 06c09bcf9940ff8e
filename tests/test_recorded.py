"""Recorded gradients are autograd's, bit for bit, on other values than those that were recorded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
from fedprior import recorded
from fedprior.losses import LOSSES
from fedprior.models import networks
from fedprior.objective import Objective
from fedprior.rng import generator, seeded_globals

FEATURES, CLASSES = 12, 3


def head(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES))


class Tied(nn.Module):
    """A layer of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x))


def tied() -> nn.Sequential:
    model = head(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
    model[2].weight = model[0].weight
    return model


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return networks.ResidualBlock(inputs, outputs, stride, lambda channels: nn.GroupNorm(1, channels))


MODELS = {
    "softmax": lambda: head(),
    "mlp": lambda: head(nn.Linear(FEATURES, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU()),
    "in-place": lambda: head(nn.Linear(FEATURES, 7), nn.ReLU(inplace=True)),
    "dropout": lambda: head(nn.Linear(FEATURES, 40), nn.GELU(), nn.Dropout(0.5)),
    "norms": lambda: head(nn.LayerNorm(FEATURES), nn.Unflatten(1, (4, 3)), nn.GroupNorm(2, 4), nn.SiLU()),
    "pooling": lambda: head(nn.Unflatten(1, (1, 12)), nn.AvgPool1d(2), nn.MaxPool1d(2), nn.Sigmoid(), nn.Softmax(1)),
    "tied": tied,
    "conv-1d": lambda: head(nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 2, 2), nn.ReLU()),
    "conv-2d": lambda: head(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 3, 2, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 5, (1, 2))
    ),
    "residual": lambda: head(nn.Unflatten(1, (1, 3, 4)), block(1, 2, 1), block(2, 2, 1), block(2, 4, 2)),
    "attention": lambda: head(nn.Unflatten(1, (3, 4)), networks.TransformerBlock(4, networks.Attention(4, 2), 8)),
    "no-bias": lambda: head(nn.Linear(FEATURES, 4, bias=False), nn.LeakyReLU()),
}


def objective(name: str) -> Objective:
    torch.random.default_generator.manual_seed(1)
    model = MODELS[name]()
    model(torch.zeros(2, FEATURES))
    made = Objective(model)
    made.train()
    return made


def batch(seed: int, examples: int) -> tuple[Tensor, Tensor]:
    rng = generator(seed, "batch")
    return torch.randn(examples, FEATURES, generator=rng), torch.randint(CLASSES, (examples,), generator=rng)


def values(of: Objective, seed: int) -> list[Tensor]:
    """Of the parameters, drawn anew."""
    rng = generator(seed, "values")
    return [torch.randn(v.shape, generator=rng) for v in of.params().values()]


def by_autograd(of: Objective, x: Tensor, y: Tensor, at: list[Tensor]) -> list[Tensor]:
    leaves = {k: v.clone().requires_grad_() for k, v in zip(of.every, at, strict=True)}
    (-of.log_lik(leaves, x, y)).backward()
    return [v.grad for v in leaves.values() if v.grad is not None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("examples", [1, 5])
def test_recorded_gradients_are_those_of_autograd(name, examples):
    of = objective(name)
    program = of.gradients(of.trainable)
    assert of.recordable and isinstance(program, recorded.Programs)
    for seed in range(4):  # the second call is recorded, the later ones are run from the record
        x, y, at = *batch(seed, examples), values(of, seed)
        torch.random.default_generator.manual_seed(seed)
        want, after = by_autograd(of, x, y, at), torch.rand(1)
        torch.random.default_generator.manual_seed(seed)
        got = program(x, y, *at)
        assert all(map(torch.equal, got, want)) and torch.equal(torch.rand(1), after)


def test_shapes_have_records_of_their_own_up_to_a_number(monkeypatch):
    monkeypatch.setattr(recorded, "MOST", 2)
    of = objective("mlp")
    program = of.gradients(of.trainable)
    for examples in (1, 2, 3) * 3:
        x, y, at = *batch(examples, examples), values(of, examples)
        assert all(map(torch.equal, program(x, y, *at), by_autograd(of, x, y, at)))
    assert len(program._programs) == 2  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize("other", [lambda x: x.t().contiguous().t(), Tensor.double], ids=["layout", "type"])
def test_layout_and_type_are_part_of_the_shape(other):
    of = objective("mlp")
    program = of.gradients(of.trainable)
    x, y = batch(0, 5)
    for given in (x, other(x)) * 3:
        at = [v.to(given.dtype) for v in values(of, 0)]
        assert all(map(torch.equal, program(given, y, *at), by_autograd(of, given, y, at)))


def test_parameters_that_nothing_depends_on_have_no_gradient():
    model = head(nn.Linear(FEATURES, 4))
    model(torch.zeros(1, FEATURES))
    model[0].unused = nn.Parameter(torch.zeros(2))
    of = Objective(model)
    gradients = dict(zip(of.trainable, of.gradients(of.trainable)(*batch(0, 2), *of.params().values()), strict=True))
    assert [k for k, g in gradients.items() if g is None] == ["0.unused"]


NOT_RECORDED = {
    "a layer of the user's own": (lambda: nn.Sequential(Tied(), nn.Linear(FEATURES, CLASSES)), "classification"),
    "a loss of the user's own": (lambda: nn.Linear(FEATURES, CLASSES), lambda o, y: -o.square().sum(1)),
    "running statistics": (
        lambda: nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES)),
        "classification",
    ),
    "recurrent": (lambda: nn.GRU(FEATURES, CLASSES), "classification"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)),
        "classification",
    ),
}


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_what_may_take_another_course_is_not_recorded(name):
    build, loss = NOT_RECORDED[name]
    model = build()
    model(torch.zeros(2, FEATURES))
    assert not Objective(model, loss).recordable


def test_hooks_are_code_of_the_users_own():
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    model[0].register_forward_hook(lambda module, args, output: None)
    assert not Objective(model).recordable


@pytest.mark.parametrize("loss", [fp.Loss(lambda o, y: -o.square().sum(1)), LOSSES["regression"]])
def test_another_loss_has_records_of_its_own(loss: fp.Loss) -> None:
    of = objective("mlp")
    x, y = batch(0, 5)
    at = values(of, 0)
    of.gradients(of.trainable)(x, y, *at)
    other, target = of.with_loss(loss), torch.zeros(5, CLASSES)
    assert other.recordable == (loss in LOSSES.values())
    for _ in range(3):
        got = other.gradients(other.trainable)(x, target, *at)
        assert all(map(torch.equal, got, by_autograd(other, x, target, at)))
    assert all(map(torch.equal, of.gradients(of.trainable)(x, y, *at), by_autograd(of, x, y, at)))


def test_a_run_without_records_has_the_same_bits(monkeypatch):
    """All batches of ragged clients, and the last ones that are smaller, by the record and by autograd."""
    rng = generator(0, "clients")
    clients = [
        fp.Client(i, f"c{i}", fp.Examples(torch.randn(n, FEATURES, generator=rng), torch.arange(n) % CLASSES))
        for i, n in enumerate((7, 12, 5))
    ]

    def run() -> fp.Result:
        model = fp.models.mlp(FEATURES, (8,), CLASSES)
        return fp.run(
            fp.fedavg(lr=0.1, batch_size=5, epochs=2), model, clients, rounds=2, cohort=3, engine="sequential"
        )

    with_records = run()
    monkeypatch.setattr(Objective, "recordable", False)
    without = run()
    for k, v in with_records.eta.mean.items():
        assert torch.equal(v, without.eta.mean[k])


def through_a_view(x: Tensor) -> tuple[Tensor, ...]:
    """Changes a part of what it returns, by a name that nothing reads afterwards."""
    y = x.clone()
    y[0].mul_(2)
    return (y,)


def a_draw_that_is_not_used(x: Tensor) -> tuple[Tensor, ...]:
    """The second draw depends on the first having been made."""
    torch.rand_like(x)
    return (x + torch.rand_like(x),)


def views_of_views(x: Tensor) -> tuple[Tensor, ...]:
    """Of an input, of a result that is changed through one of them, and one that changes nothing."""
    y = x * 2
    y[1:].t()[0].add_(x[1:][:, 1])
    return (torch.stack([y[1:][1], x[1:].t()[1:][0][:1].expand(3), y.t().t()[:, 0]]),)


def flat(x: Tensor) -> tuple[Tensor, ...]:
    """A view of one layout, a copy of another."""
    return (x.reshape(-1),)


def other_types(x: Tensor) -> tuple[Tensor, ...]:
    """Views that read the same memory otherwise: as integers, conjugate, with the sign changed."""
    y = torch.complex(x, 2 * x + 1).conj()
    return (
        torch.stack([(x * 2).view(torch.int32).add(1).view(torch.float32), y.imag, torch.view_as_real(y * y)[..., 1]]),
    )


@pytest.mark.parametrize("function", [through_a_view, a_draw_that_is_not_used, views_of_views, flat, other_types])
def test_effects_draws_and_layouts_are_those_of_the_function(function) -> None:
    programs = recorded.Programs(function)
    x = torch.arange(9.0).view(3, 3)
    for i, at in enumerate([x, x + 1, x + 2, x.t(), x.t() - 2, x.t() - 3]):
        begins = torch.zeros(9 + i)[i:]  # elsewhere in its memory, each time
        found = []
        for compute in (programs, function):
            with seeded_globals(generator(i), torch.device("cpu")):
                found.append(compute(begins.as_strided(at.shape, at.stride()).copy_(at))[0])
        assert torch.equal(*found)
