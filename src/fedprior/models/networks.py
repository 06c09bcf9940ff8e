"""Networks: dense, convolutional, recurrent, attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprior.rng import generator

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)


def own_randomness(build: Callable[P, M]) -> Callable[P, M]:
    """PyTorch's layers draw from its global generator when they are made: give it back as it was."""

    @functools.wraps(build)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> M:
        with torch.random.fork_rng(devices=[]):
            return build(*args, **kwargs)

    return wrapped


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """PyTorch's default initialisation laws, drawn from our own generator."""
    rng = generator(seed, "model")
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            fan_in = _fan_in(module, name)
            if isinstance(module, nn.Embedding):
                p.data.normal_(generator=rng)
            elif fan_in:
                p.data.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=rng)
    return model


def _fan_in(module: nn.Module, name: str) -> int:
    """Inputs per unit of a layer, 0 for layers (norms) whose initialisation is not random."""
    if isinstance(module, nn.GRU):
        return module.hidden_size
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear | nn.Conv2d) and isinstance(weight, nn.Parameter):
        return weight[0].numel()
    return 0


@own_randomness
def lenet(
    channels: tuple[int, int] = (20, 50), hidden: int = 500, classes: int = 10, image: int = 28, seed: int = 0
) -> nn.Module:
    """Two 5x5 convolutions with max-pooling and two dense layers; (n, 1, image, image) -> (n, classes).

    The default, 20-50-500, has 431,080 parameters.
    """
    first, second = channels
    side = ((image - 4) // 2 - 4) // 2
    if side < 1:
        raise ValueError(f"images of {image} x {image} are too small for lenet (16 x 16 at least); use mlp or softmax")
    layers = nn.Sequential(
        nn.Conv2d(1, first, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(first, second, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * side * side, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )
    return seeded(layers, seed)


@own_randomness
def mlp(inputs: int = 784, hidden: tuple[int, ...] = (200, 200), classes: int = 10, seed: int = 0) -> nn.Module:
    """Dense layers with ReLU; (n, ...) is flattened to (n, inputs)."""
    sizes = (inputs, *hidden)
    if min(*sizes, classes) < 1:
        raise ValueError(f"mlp needs layers of at least 1 unit, got {(*sizes, classes)}")
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return seeded(nn.Sequential(*layers, nn.Linear(sizes[-1], classes)), seed)


def softmax(inputs: int = 784, classes: int = 10, seed: int = 0) -> nn.Module:
    """Multinomial logistic regression."""
    return mlp(inputs, (), classes, seed)


class CharGRU(nn.Module):
    """Next-character model: (n, window) int64 -> logits (n, vocabulary) after the last character."""

    def __init__(self, vocabulary: int, embedding: int = 8, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the character that follows the window."""
        states, _ = self.gru(self.embedding(x))
        return self.head(states[:, -1])


@own_randomness
def char_gru(vocabulary: int, embedding: int = 8, hidden: int = 128, seed: int = 0) -> nn.Module:
    """A CharGRU initialised from `seed`."""
    return seeded(CharGRU(vocabulary, embedding, hidden), seed)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = norm(outputs), norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        h = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (h + self.shortcut(x)).relu()


_NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(channels // 2, channels),
}


@own_randomness
def resnet(
    depth: int = 20, norm: str = "group", width: int = 16, channels: int = 1, classes: int = 10, seed: int = 0
) -> nn.Module:
    """ResNet of He et al. 2016, arXiv:1512.03385, section 4.2; (n, channels, h, w) -> (n, classes).

    Args:
        depth: 6 k + 2 layers: 8, 14, 20, ...
        norm: "batch", or "group" with groups of two channels.
        width: filters of the first stage; the next two have twice and four times as many.
        channels: of the images.
        classes: of the outputs.
        seed: of the initial weights.
    """
    if depth < 8 or depth % 6 != 2 or norm not in _NORMS:
        raise ValueError(f"resnet needs depth 8, 14, 20, ... and norm 'batch' or 'group', got {depth} and {norm!r}")
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), _NORMS[norm](width), nn.ReLU()]
    inputs = width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(depth // 6):
            stride = 2 if outputs > inputs else 1
            layers.append(ResidualBlock(inputs, outputs, stride, _NORMS[norm]))
            inputs = outputs
    return seeded(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)), seed)


class Attention(nn.Module):
    """Multi-head self-attention; the number of heads follows from the layers, so that heads can be removed.

    Args:
        width: of the stream.
        heads: how many.
        head_dim: size of a head; None for width / heads.
        causal: let a position see only itself and those before it.
    """

    def __init__(self, width: int, heads: int, head_dim: int | None = None, causal: bool = False) -> None:
        super().__init__()
        self.head_dim, self.causal = head_dim or width // heads, causal
        inner = heads * self.head_dim
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, positions, width) -> the same shape."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm and added to the stream."""

    def __init__(self, width: int, attention: Attention, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, positions, width) -> the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.second(F.gelu(self.first(self.norm2(x))))


class ViT(nn.Module):
    """A small vision transformer with learned positions and mean pooling (Dosovitskiy et al., arXiv:2010.11929)."""

    def __init__(self, image: int, patch: int, width: int, heads: int, depth: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Embedding((image // patch) ** 2, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, Attention(width, heads), hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, image, image) -> (n, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions.weight
        return self.head(self.norm(self.blocks(x)).mean(1))


@own_randomness
def vit(
    image: int = 28,
    patch: int = 4,
    width: int = 48,
    heads: int = 4,
    depth: int = 4,
    hidden: int = 96,
    classes: int = 10,
    seed: int = 0,
) -> nn.Module:
    """A ViT initialised from `seed`; heads and hidden neurons can be removed, the width cannot."""
    if width % heads or image % patch:
        raise ValueError(
            "vit needs heads that divide width, and a patch that divides the side of the images; got "
            f"{heads=}, {width=}, {patch=}, {image=}"
        )
    return seeded(ViT(image, patch, width, heads, depth, hidden, classes), seed)


class CharTransformer(nn.Module):
    """Next-character model with causal attention, learned positions and LayerNorms before each step.

    (n, window) int64 -> logits (n, vocabulary) after the last character, or, if `every`, (n, window, vocabulary).
    """

    def __init__(self, vocabulary: int, window: int, width: int, blocks: list[TransformerBlock], every: bool) -> None:
        super().__init__()
        self.every = every
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(window, width)
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the character that follows the window, or each of its characters."""
        h = self.norm(self.blocks(self.embedding(x) + self.positions.weight))
        return self.head(h if self.every else h[:, -1])


@own_randomness
def char_transformer(
    vocabulary: int,
    window: int = 80,
    width: int = 64,
    heads: int = 4,
    head_dim: int = 16,
    depth: int = 2,
    hidden: int = 256,
    every: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A CharTransformer initialised from `seed`; heads and hidden neurons can be removed, the width cannot.

    The default has 115,536 parameters for the 80 characters of Shakespeare. `every` asks for targets of shape
    (n, window): data.load("shakespeare", every=True).
    """
    if min(vocabulary, window, width, heads, head_dim, depth, hidden) < 1:
        raise ValueError(
            "char_transformer needs sizes of at least 1, got "
            f"{vocabulary=}, {window=}, {width=}, {heads=}, {head_dim=}, {depth=}, {hidden=}"
        )
    blocks = [TransformerBlock(width, Attention(width, heads, head_dim, causal=True), hidden) for _ in range(depth)]
    model = CharTransformer(vocabulary, window, width, blocks, every)
    seeded(model, seed)
    model.positions.weight.data.mul_(0.1)  # else they drown the characters, and SGD takes twice the rounds
    return model
