"""Small models for the examples, the command line and the benchmarks."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from fedprior.rng import generator


def _seeded(model: nn.Module, seed: int) -> nn.Module:
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
    return _seeded(layers, seed)


def mlp(inputs: int = 784, hidden: tuple[int, ...] = (200, 200), classes: int = 10, seed: int = 0) -> nn.Module:
    """Dense layers with ReLU; (n, ...) is flattened to (n, inputs)."""
    sizes = (inputs, *hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return _seeded(nn.Sequential(*layers, nn.Linear(sizes[-1], classes)), seed)


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


def char_gru(vocabulary: int, embedding: int = 8, hidden: int = 128, seed: int = 0) -> nn.Module:
    """A CharGRU initialised from `seed`."""
    return _seeded(CharGRU(vocabulary, embedding, hidden), seed)
