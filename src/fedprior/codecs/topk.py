r"""The largest entries alone: all others are decoded as zero, so what is sent should be differences (wire.py).

The tensors of two dimensions and more are one vector of n entries, in the order of the schema. Of these the
k = max(1, round(fraction n)) of largest magnitude travel, the first ones among equals. Vectors and scalars (biases,
gates, running means) are few, and are sent whole and exact.

    whole        the exact values of every tensor of fewer than two dimensions
    kind         one byte: how the positions are written, whichever makes the shorter payload
    positions    kind 0: a bitmap, one bit an entry
                 kind 1: k gaps (entries left out before each one that is kept) as LEB128: seven bits a byte, lowest
                 first, the top bit set where more follow; for 8 k < n alone, as they are longer than the bitmap else
    values       the kept values of each tensor, as one row of its coding (quantized.py): integers have one step

Both sides know k, and gaps that add up to less than n fill at most k + n / 127 bytes.

Aji, Heafield 2017, arXiv:1704.05021; Stich, Cordonnier, Jaggi 2018, arXiv:1809.07599.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedprior.codecs.frame import Frame, schema_of, to_numpy, to_tensor
from fedprior.codecs.quantized import Noise, Shape, coding, exact
from fedprior.codecs.reader import PayloadError, Reader
from fedprior.core import Params, Schema

CODEC = 3


@dataclass(frozen=True)
class TopK:
    """Bytes shrink with the fraction that is kept; the positions cost up to ten bits an entry, less after zlib.

    Attributes:
        fraction: of the entries of all tensors of two dimensions and more together, 0 < fraction <= 1.
        value_type, entropy, seed: as in Dense; a coding sees the kept values only.
    """

    fraction: float
    value_type: str = "float32"
    entropy: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"TopK needs 0 < fraction <= 1, got {self.fraction}")
        _ = self._frame  # which checks the names

    @property
    def _frame(self) -> Frame:
        return Frame(CODEC, self.value_type, self.entropy)

    def _kept(self, entries: int) -> int:
        return min(entries, max(1, round(self.fraction * entries)))

    def encode(self, message: Params, clients: float) -> bytes:
        """One framed payload: the shorter one of those with a bitmap and with gaps."""
        arrays = [to_numpy(value, exact(self.value_type).dtype) for value in message.values()]
        noise = Noise(arrays, self.seed)
        large = [values for values in arrays if values.ndim >= 2]
        magnitude = np.concatenate([*(np.abs(v).ravel() for v in large), np.zeros(0, np.float32)])
        kept = largest(magnitude, self._kept(magnitude.size))
        whole = b"".join(values.tobytes() for values in arrays if values.ndim < 2)
        rows = [values[bits][None] for values, bits in zip(large, _split(kept, [v.shape for v in large]), strict=True)]
        tail = b"".join(coding(self.value_type, row.shape).write(row, noise) for row in rows)
        schema = schema_of(message)
        return min((self._frame.pack(schema, clients, whole + p + tail) for p in _positions(kept)), key=len)

    def _sizes(self, schema: Schema) -> tuple[list[Shape], int, int, int]:
        """The shapes of large tensors, their entries, how many of these travel, and the bytes of whole and kind."""
        shapes = [shape for shape, _ in schema.values()]
        large = [shape for shape in shapes if len(shape) >= 2]
        entries = sum(map(math.prod, large))
        whole = sum(exact(self.value_type).size(shape) for shape in shapes if len(shape) < 2)
        return large, entries, self._kept(entries), whole + 1

    def longest(self, schema: Schema) -> int:
        """The most bytes of a payload: integers have a step, and an unfinished byte, in each tensor."""
        large, entries, kept, whole = self._sizes(schema)
        bitmap, row = -(-entries // 8), (1, kept)
        values = min(exact(self.value_type).size(row), coding(self.value_type, row).size(row) + 5 * len(large))
        return self._frame.longest(whole + min(bitmap, _longest_gaps(kept, entries) or bitmap) + values)

    def decode(self, payload: bytes, schema: Schema) -> tuple[Params, float]:
        """The message and its weight."""
        plain, (large, entries, kept, whole) = exact(self.value_type), self._sizes(schema)
        positions = max(-(-entries // 8), _longest_gaps(kept, entries))
        reader, clients = self._frame.unpack(payload, schema, whole + positions + plain.size((kept,)))
        arrays = {n: plain.read(reader, n, shape) for n, (shape, _) in schema.items() if len(shape) < 2}
        bits = iter(_split(_read_positions(reader, kept, entries), large))
        for name, (shape, _) in schema.items():
            if len(shape) >= 2:
                arrays[name] = self._values(reader, name, next(bits))
        reader.finish()
        return {name: to_tensor(name, arrays[name], dtype) for name, (_, dtype) in schema.items()}, clients

    def _values(self, reader: Reader, name: str, bits: np.ndarray) -> np.ndarray:
        """One tensor, zero where its bits are."""
        row = (1, int(bits.sum()))
        out = np.zeros(bits.shape, exact(self.value_type).dtype)
        out[bits] = coding(self.value_type, row).read(reader, name, row)[0]
        return out


def largest(magnitude: np.ndarray, count: int) -> np.ndarray:
    """Booleans, set at the `count` largest entries, the first ones among equals; what is no number is the largest."""
    magnitude = np.nan_to_num(magnitude, copy=False, nan=np.inf, posinf=np.inf)
    if count == 0:
        return np.zeros(magnitude.size, bool)
    least = np.partition(magnitude, magnitude.size - count)[magnitude.size - count]
    kept = magnitude > least
    kept[np.flatnonzero(magnitude == least)[: count - int(kept.sum())]] = True
    return kept


def _split(kept: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
    """The booleans of each tensor, in its shape."""
    ends = np.cumsum([math.prod(shape) for shape in shapes], dtype=np.int64)
    return [bits.reshape(shape) for bits, shape in zip(np.split(kept, ends)[:-1], shapes, strict=True)]


def _positions(kept: np.ndarray) -> Iterator[bytes]:
    """Kind and positions, in every way there is."""
    yield b"\0" + np.packbits(kept).tobytes()
    if 8 * int(kept.sum()) < kept.size:
        yield b"\1" + _varints(np.diff(np.flatnonzero(kept), prepend=-1) - 1)


def _varints(numbers: np.ndarray) -> bytes:
    """LEB128."""
    digits = numbers[:, None] >> np.arange(0, 63, 7)
    used = digits > 0
    more = np.roll(used, -1, axis=1)  # the ninth digit of a position is 0
    used[:, 0] = True
    return (digits & 127 | more << 7)[used].astype(np.uint8).tobytes()


def _longest_gaps(kept: int, entries: int) -> int:
    return kept + entries // 127 if 8 * kept < entries else 0


def _read_positions(reader: Reader, kept: int, entries: int) -> np.ndarray:
    """Booleans, `kept` of which are set."""
    kind = reader.bytes(1, "positions")[0]
    if kind > (8 * kept < entries):
        raise PayloadError(f"kind {kind} of positions is unknown")
    if kind == 0:
        bits = reader.mask(entries, "positions")
        if int(bits.sum()) != kept:
            raise PayloadError(f"{int(bits.sum())} positions, expected {kept} of {entries}")
        return bits
    gaps = reader.varints(kept, _longest_gaps(kept, entries), "positions")
    if int(gaps.max()) >= entries or kept + int(gaps.sum()) > entries:
        raise PayloadError(f"positions lie beyond the {entries} entries")
    bits = np.zeros(entries, bool)
    bits[np.cumsum(gaps + 1) - 1] = True
    return bits
