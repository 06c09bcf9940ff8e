r"""Value codings: how the values of one tensor are written.

    value type   a value takes                         exact up to
    float32      4 bytes                               float32
    float64      8 bytes                               float64
    bfloat16     2 bytes                               8 significant bits, to nearest
    int8         1 byte, and 4 bytes a row             a step: max|row| / 127
    int4         half a byte, and 4 bytes a row        a step: max|row| / 7
    int2         a quarter of a byte, 4 bytes a row    a step: max|row| (the values are -1, 0 and 1 steps)

A row is a slice of dimension 0: a unit's weights. bfloat16 and the integers are for tensors of two dimensions and
more, where they are shorter than float32; all others (biases, theta, scalars, columns) are float32. Values wider
than float32 are rounded to it before anything else.

Stochastic rounding. With b bits, m = 2^(b-1) - 1, the row's step s (float32, the least with s m >= max|row|) and u
uniform on [0, 1), the integer is floor(x/s + u), from -m to m; as a code it has m added, and 2 m + 1 is never sent.

    E[s floor(x/s + u)] = x      Var = s^2 f (1 - f) <= s^2 / 4,  f = x/s - floor(x/s)

Zeros stay zeros, the largest entry of a row stays within one step, and a row of zeros has s = 0. Limits: a positive
value less than a step may arrive as zero (a prior that takes its logarithm needs float32), and one next to the
largest float32 may arrive as infinite, to be refused. The product s q is rounded to float32.

Where u comes from. A codec has no generator, so the noise is drawn from a seed that is a hash of the message's
values and the codec's `seed`: equal messages have equal bytes, on every engine and after a resume, and messages
that differ in a single bit have unrelated noise. Limits: clients whose messages are equal to the last bit make equal
errors, which do not average out; engines that agree up to rounding only have different noise, thus agree up to a
step; and whoever can guess the message knows the noise, so it protects nobody's privacy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from fedprior.codecs.frame import Bytes
from fedprior.codecs.reader import PayloadError, Reader
from fedprior.rng import numpy_generator

Shape = tuple[int, ...]


class Noise:
    """The rounding noise of one message: drawn tensor by tensor, in the order of the message."""

    def __init__(self, arrays: Sequence[np.ndarray], seed: int) -> None:
        self._arrays, self._seed = arrays, seed

    @cached_property
    def _rng(self) -> np.random.Generator:
        digest = hashlib.blake2b(digest_size=16)
        for values in self._arrays:
            digest.update(values.tobytes())
        return numpy_generator(self._seed, "rounding", digest.hexdigest())

    def draw(self, shape: Shape) -> np.ndarray:
        """Uniform on [0, 1)."""
        return self._rng.random(shape)


class Coding(Protocol):
    """One way to write an array whose shape both sides know."""

    def size(self, shape: Shape) -> int:
        """Bytes."""
        ...

    def write(self, values: np.ndarray, noise: Noise) -> Bytes:
        """`values` are float32, or float64 under that value type."""
        ...

    def read(self, reader: Reader, name: str, shape: Shape) -> np.ndarray:
        """The inverse of `write`; a PayloadError for bytes that it does not write."""
        ...


@dataclass(frozen=True)
class Float:
    """The values as they are."""

    dtype: np.dtype

    def size(self, shape: Shape) -> int:
        """See Coding."""
        return math.prod(shape) * self.dtype.itemsize

    def write(self, values: np.ndarray, noise: Noise) -> Bytes:
        """See Coding."""
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

    def read(self, reader: Reader, name: str, shape: Shape) -> np.ndarray:
        """See Coding."""
        return reader.array(self.dtype, math.prod(shape), name).reshape(shape)


@dataclass(frozen=True)
class BFloat16:
    """The upper half of a float32: all first bytes, which an entropy coder can shrink, then all second ones."""

    def size(self, shape: Shape) -> int:
        """See Coding."""
        return 2 * math.prod(shape)

    def write(self, values: np.ndarray, noise: Noise) -> bytes:
        """See Coding."""
        halves = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint8)
        return halves.numpy().reshape(-1, 2)[:, ::-1].T.tobytes()

    def read(self, reader: Reader, name: str, shape: Shape) -> np.ndarray:
        """See Coding."""
        high, low = reader.array("u1", self.size(shape), name).reshape(2, -1)
        return (high.astype(np.uint32) << 24 | low.astype(np.uint32) << 16).view(np.float32).reshape(shape)


@dataclass(frozen=True)
class Integers:
    """Steps of all rows, then the codes, `bits` each, from the lowest bits of a byte to the highest."""

    bits: int

    @property
    def most(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1

    @property
    def _shifts(self) -> np.ndarray:
        return np.arange(0, 8, self.bits, dtype=np.uint8)

    def size(self, shape: Shape) -> int:
        """See Coding."""
        return 4 * shape[0] + -(-math.prod(shape) * self.bits // 8)

    def write(self, values: np.ndarray, noise: Noise) -> bytes:
        """See Coding."""
        rows = values.reshape(len(values), math.prod(values.shape[1:]))
        steps = self._steps(rows)
        ratio = np.zeros(rows.shape)
        usable = np.isfinite(steps) & (steps > 0)  # a step that is not finite is refused by the receiver
        np.divide(rows, steps[:, None], out=ratio, where=usable[:, None], dtype=np.float64)
        whole = np.floor(ratio)
        whole += noise.draw(rows.shape) < ratio - whole
        return steps.astype("<f4").tobytes() + self._pack((whole + self.most).astype(np.uint8).ravel())

    def _steps(self, rows: np.ndarray) -> np.ndarray:
        largest = np.abs(rows).max(axis=1, initial=0)
        steps = largest / np.float32(self.most)
        short = steps.astype(np.float64) * self.most < largest
        return np.where(short, np.nextafter(steps, np.float32(np.inf)), steps)

    def _pack(self, codes: np.ndarray) -> bytes:
        padded = np.zeros((-(-codes.size * self.bits // 8), 8 // self.bits), np.uint8)
        padded.reshape(-1)[: codes.size] = codes
        return np.bitwise_or.reduce(padded << self._shifts, axis=1).tobytes()

    def read(self, reader: Reader, name: str, shape: Shape) -> np.ndarray:
        """See Coding."""
        count = math.prod(shape)
        steps = reader.array("<f4", shape[0], name)
        if not (np.isfinite(steps) & (steps >= 0)).all():
            raise PayloadError(f"steps of {name} are not finite, or negative")
        packed = reader.array("u1", self.size(shape) - 4 * shape[0], name)
        codes = (packed[:, None] >> self._shifts & (2**self.bits - 1)).reshape(-1)
        if codes[count:].any() or (codes[:count] > 2 * self.most).any():
            raise PayloadError(f"codes of {name} are out of range")
        values = codes[:count].astype(np.float32)
        values -= self.most
        rows = values.reshape(shape)
        with np.errstate(over="ignore"):  # infinite, to be refused with all else that is not finite
            rows *= steps.reshape(-1, *[1] * (len(shape) - 1))
        return rows


_CODINGS: dict[str, Coding] = {
    "float32": Float(np.dtype("<f4")),
    "float64": Float(np.dtype("<f8")),
    "bfloat16": BFloat16(),
    "int8": Integers(8),
    "int4": Integers(4),
    "int2": Integers(2),
}


def exact(value_type: str) -> Float:
    """The coding of single values, and of tensors that are not worth another: float32, or float64 for itself."""
    coding = _CODINGS[value_type]
    return coding if isinstance(coding, Float) else Float(np.dtype("<f4"))


def coding(value_type: str, shape: Shape) -> Coding:
    """The coding of a tensor of this shape."""
    plain, short = exact(value_type), _CODINGS[value_type]
    return short if len(shape) >= 2 and short.size(shape) < plain.size(shape) else plain
