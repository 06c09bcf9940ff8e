"""Small networks whose layers share units: sums, a block of one layer, concatenation, batch norm, a layer called twice;
and networks with recurrent layers between those that have units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fedprior as fp


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


class Twice(nn.Module):
    """One encoder reads both halves of (n, 8); its units are read three times, and `gain` is in no layer."""

    def __init__(self, width: int = 6, hidden: int = 7) -> None:
        super().__init__()
        self.encoder, self.mix = nn.Linear(4, width), nn.Linear(2 * width, hidden)
        self.side, self.gain, self.head = nn.Linear(width, 3), nn.Parameter(torch.ones(3)), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.encoder(half).relu() for half in x.chunk(2, 1))
        return self.head(self.mix(torch.cat([a * b, a - b], 1)).relu()) + self.gain * self.side(a).tanh()


def hidden_layer(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def gru_net() -> nn.Module:
    """The library's CharGRU with hidden layers before and after its recurrent one."""
    model = fp.models.CharGRU(8, 4, 6)
    model.embedding = nn.Sequential(nn.Embedding(8, 4), hidden_layer(4, 5, 4))  # type: ignore[assignment]
    model.head = hidden_layer(6, 8, 8)  # type: ignore[assignment]
    return model


def packed(lstm: nn.LSTM, h: Tensor) -> Tensor:
    lengths = torch.full((len(h),), h.shape[1])
    states, _ = lstm(pack_padded_sequence(h, lengths, batch_first=True))
    return pad_packed_sequence(states, batch_first=True)[0]


def step_by_step(cell: nn.LSTMCell, h: Tensor) -> Tensor:
    state = None
    for position in h.unbind(1):
        state = cell(position, state)
    return state[0]  # type: ignore[index]


READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "states": lambda lstm, h: lstm(h)[0],
    "last state": lambda lstm, h: lstm(h)[1][0][-1],
    "packed": packed,
    "cell": step_by_step,
    "two directions": lambda lstm, h: lstm(input=h)[0],
    "a projection": lambda lstm, h: lstm(h)[1][0][-1],
    "one state": lambda gru, h: gru(h)[1][-1],
}
LSTMS: dict[str, Callable[[], nn.Module]] = {
    "cell": lambda: nn.LSTMCell(4, 6),
    "two directions": lambda: nn.LSTM(4, 3, batch_first=True, bidirectional=True),
    "a projection": lambda: nn.LSTM(4, 9, batch_first=True, proj_size=6),
    "one state": lambda: nn.GRU(4, 1, batch_first=True),
}


class CharLSTM(nn.Module):
    """Logits of every next character, or of the one after the last state; hidden layers before and after an LSTM."""

    def __init__(self, reads: str = "states", hidden: bool = True) -> None:
        super().__init__()
        self.reads, self.embedding = reads, nn.Embedding(8, 4)
        self.before = hidden_layer(4, 5, 4) if hidden else nn.Identity()
        self.lstm: Any = LSTMS.get(reads, lambda: nn.LSTM(4, 6, batch_first=True))()
        width = 1 if reads == "one state" else 6
        self.head = hidden_layer(width, 8, 8) if hidden else nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(READS[self.reads](self.lstm, self.before(self.embedding(x))))


class Beside(nn.Module):
    """The head's first columns read a GRU, and only the others read units."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gru, self.side, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(4, width), nn.Linear(3 + width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.gru(x)[1][-1], self.side(x.mean(1)).relu()], 1))
