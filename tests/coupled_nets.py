"""Small networks whose layers share units: sums, a block of one layer, concatenation, batch norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """stem -> relu -> + conv2(relu(conv1(.))) -> relu -> head: the stem's filters and conv2's are one group."""

    def __init__(self, width: int = 4, inner: int = 3) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(1, width, 3), nn.Conv2d(width, inner, 3, padding=1)
        self.conv2, self.head = nn.Conv2d(inner, width, 3, padding=1), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        return self.head((h + self.conv2(self.conv1(h).relu())).relu().mean((2, 3)))


class OneLayerBlock(nn.Module):
    """a -> relu -> h + b(h) -> head: rows and columns of b are the same units."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.head((h + self.b(h)).relu())


class Branches(nn.Module):
    """Two convolutions side by side, concatenated: each holds some of the third one's columns."""

    def __init__(self, first: int = 3, second: int = 2, third: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, first, 3), nn.Conv2d(1, second, 3)
        self.c, self.head = nn.Conv2d(first + second, third, 3), nn.Linear(third, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
        return self.head(self.c(h).relu().mean((2, 3)))


def norm_net(first: int = 4, second: int = 3) -> nn.Module:
    """Convolutions with batch norm."""
    layers = [nn.Conv2d(1, first, 3), nn.BatchNorm2d(first), nn.ReLU(), nn.Conv2d(first, second, 3)]
    layers += [nn.BatchNorm2d(second), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 3)]
    return nn.Sequential(*layers)
