"""Faster layers: values and gradients of PyTorch's own, in float64; and only where they are known to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedprior.kernels import faster
from fedprior.objective import Objective
from fedprior.rng import generator


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, *shape), dtype=torch.float64)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "gru": (lambda: nn.GRU(3, 5), drawn(7, 2, 3)),
    "gru, batch first": (lambda: nn.GRU(3, 5, batch_first=True), drawn(2, 7, 3)),
    "gru, one step": (lambda: nn.GRU(3, 5), drawn(1, 2, 3)),
    "1 x 1": (lambda: nn.Conv2d(4, 6, 1, stride=2), drawn(3, 4, 7, 6)),
    "1 x 1, groups": (lambda: nn.Conv2d(4, 6, 1, stride=(3, 1), groups=2, bias=False), drawn(3, 4, 7, 6)),
    "patches": (lambda: nn.Conv2d(3, 6, 3), drawn(3, 3, 7, 6)),
    "patches, strides": (lambda: nn.Conv2d(3, 6, (3, 2), (1, 2), (2, 1), bias=False), drawn(3, 3, 7, 6)),
    "patches, strides down": (lambda: nn.Conv2d(3, 6, (2, 3), (3, 2), (0, 1)), drawn(3, 3, 9, 6)),
    "patches, one image alone": (lambda: nn.Conv2d(3, 6, 3), drawn(3, 7, 6)),
    "patches, no images": (lambda: nn.Conv2d(3, 6, 3), drawn(0, 3, 7, 6)),
    "patches, more than fit": (lambda: nn.Conv2d(15, 14, 5), drawn(10, 15, 20, 20)),
    "flat": (lambda: nn.Flatten(), drawn(3, 2, 5, 4)),
    "flat, examples last": (lambda: nn.Flatten(), drawn(5, 2, 4, 20).permute(3, 1, 0, 2)),
    "flat, few examples last": (lambda: nn.Flatten(), drawn(5, 2, 4, 3).permute(3, 1, 0, 2)),
    "a pool": (lambda: nn.MaxPool2d(2), drawn(3, 2, 5, 4).round()),
    "a pool, examples last": (lambda: nn.MaxPool2d(3, 2, 1), drawn(7, 2, 6, 3).round().permute(3, 1, 0, 2)),
    "a pool, rounded up": (lambda: nn.MaxPool2d((3, 2), ceil_mode=True), drawn(7, 2, 5, 3).round().permute(3, 1, 0, 2)),
    "a pool, dilated": (lambda: nn.MaxPool2d(2, (1, 2), (1, 0), (2, 1)), drawn(7, 2, 6, 3).round().permute(3, 1, 0, 2)),
    "grey": (lambda: nn.Conv2d(1, 6, 3), drawn(3, 1, 7, 6)),
    "grey, strides": (lambda: nn.Conv2d(1, 6, (3, 2), (1, 2), (2, 1), bias=False), drawn(3, 1, 7, 6)),
    "grey, strides down": (lambda: nn.Conv2d(1, 6, (2, 3), (3, 2), (0, 1)), drawn(3, 1, 9, 6)),
    "grey, one image alone": (lambda: nn.Conv2d(1, 6, 3), drawn(1, 7, 6)),
    "grey, no images": (lambda: nn.Conv2d(1, 6, 3), drawn(0, 1, 7, 6)),
}


def of_module(layer: nn.Module, x: Tensor, constant: bool = False) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of a sum of random multiples of all of them; of x too, unless it is constant."""
    x = x.clone().requires_grad_(not constant)
    outputs = layer(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    value = torch.stack([(drawn(*o.shape) * o).sum() for o in outputs]).sum()
    leaves = [*[x] * (not constant), *layer.parameters()]
    return *outputs, *(torch.autograd.grad(value, leaves) if leaves else ())


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_pytorch(name: str, last: bool, constant: bool) -> None:
    make, x = LAYERS[name]
    layer: Any = make().double()
    if last:
        layer = layer.to(memory_format=torch.channels_last)
    expected = of_module(layer, x, constant)
    [(found, forward)] = faster(layer)
    assert found is layer
    layer.forward = forward
    for ours, theirs in zip(of_module(layer, x, constant), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("grey")])
def test_grey_images_beside_a_norm(name: str, constant: bool) -> None:
    make, x = LAYERS[name]
    layer: Any = make().double()
    expected = of_module(layer, x, constant)
    [(found, layer.forward)] = faster(nn.Sequential(layer, nn.GroupNorm(1, 6)))
    assert found is layer
    found = of_module(layer, x, constant)
    assert found[0].is_contiguous()  # as a norm wants it
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.GRU(3, 5, num_layers=2),
        nn.GRU(3, 5, bidirectional=True),
        nn.GRU(3, 5, bias=False),
        nn.LSTM(3, 5),
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.MaxPool2d(2, return_indices=True),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 1, stride=2, padding=1),
        nn.Conv2d(1, 6, 3, padding="same"),
        nn.Conv2d(1, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(1, 6, 3, dilation=2),
        nn.Sequential(nn.Conv2d(1, 16, 3), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.Flatten()),
        nn.Flatten(2),
        nn.Flatten(1, 2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 1, stride=2)),
    ],
    ids=str,
)
def test_other_layers_stay_as_they_are(layer: nn.Module) -> None:
    assert not faster(layer)


@pytest.mark.parametrize("beside", [(), (nn.GroupNorm(1, 6),)], ids=["alone", "beside a norm"])
@pytest.mark.parametrize("shape", [(3, 3, 7, 6), (3, 2, 7, 6), (3, 1, 2, 6), (3, 1, 7, 2), (3, 7, 6)], ids=str)
def test_images_that_do_not_fit_are_refused_in_pytorchs_words(
    shape: tuple[int, ...], beside: tuple[nn.Module, ...]
) -> None:
    """Of other channels, or smaller than the filters; no filter reads the one channel that it knows and is content."""
    layer: Any = nn.Conv2d(1, 6, 3).double()
    with pytest.raises(RuntimeError) as expected:
        layer(drawn(*shape))
    [(_, layer.forward)] = faster(nn.Sequential(layer, *beside))
    with pytest.raises(RuntimeError) as found:
        layer(drawn(*shape))
    assert str(found.value) == str(expected.value)


def test_beside_norms_only_grey_images_have_patches() -> None:
    """What a norm reads stays in the order that it wants."""
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    assert [m for m, _ in faster(net)] == [net[0]]


def test_a_network_of_convolutions_and_pools_is_pytorchs() -> None:
    """Layers that hand examples on in another order; of equal values the first one has a pool's gradient."""
    net: Any = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.MaxPool2d((2, 1)),
        nn.Flatten(),
    ).double()
    x = drawn(5, 1, 12, 10).relu()
    expected, layers = of_module(net, x), faster(net)
    for layer, forward in layers:
        layer.forward = forward
    assert len(layers) == 5
    for ours, theirs in zip(of_module(net, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_other_uses_of_a_gru_are_left_to_pytorch() -> None:
    """A state to begin with, sequences of several lengths, one sequence alone."""
    layer: Any = nn.GRU(3, 5).double()
    packed = nn.utils.rnn.pack_padded_sequence(drawn(7, 2, 3), torch.tensor([7, 4]))
    uses: list[tuple[Any, ...]] = [(drawn(7, 2, 3), drawn(1, 2, 5)), (packed,), (drawn(7, 3),)]
    expected = [layer(*use) for use in uses]
    layer.forward = faster(layer)[0][1]
    for use, (outputs, last) in zip(uses, expected, strict=True):
        ours, end = layer(*use)
        assert torch.equal(getattr(ours, "data", ours), getattr(outputs, "data", outputs)) and torch.equal(end, last)


class Reader(nn.Module):
    """A recurrent model with a strided shortcut before it."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.gru, self.head = nn.Conv2d(1, 2, 1, stride=2), nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.cut(x).transpose(1, 2).flatten(2))[0][:, -1])


def test_a_held_model_has_them_and_any_other_has_not() -> None:
    """Within `holding`, blocks in blocks too; the values are the same to rounding."""
    objective = Objective(Reader().double())
    layers = [m for m, _ in faster(objective.model)]
    phi, other = objective.params(), {k: v + 0.1 for k, v in objective.params().items()}
    x = drawn(5, 1, 6, 6)
    expected, of_other = objective.outputs(phi, x), objective.outputs(other, x)
    with objective.holding(phi):
        assert len(layers) == 2 and all("forward" in vars(m) for m in layers)
        torch.testing.assert_close(objective.outputs(phi, x), expected, rtol=1e-12, atol=1e-12)
        with objective.holding(other):
            torch.testing.assert_close(objective.outputs(other, x), of_other, rtol=1e-12, atol=1e-12)
        assert all("forward" in vars(m) for m in layers)
    assert not any("forward" in vars(m) for m in layers)
    assert torch.equal(objective.outputs(phi, x), expected)
