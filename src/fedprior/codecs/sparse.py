"""Kept units as bit masks, then their values: nothing is sent for a unit whose values are all zero.

For each tensor, in the order of the schema:

    row bits      one bit per index of dimension 0, set where the slice has a nonzero
    column bits   the same for dimension 1, if there is one
    kind          one byte: 1 if all kept values are equal (as those of a mask are), else 0
    values        one value (kind 1), or all of the kept rows and columns (kind 0)

A scalar is its value alone. Lossless up to the value type and the sign of zero: the zeros that are not sent are
the zeros that are decoded, so the codec needs to know nothing of gates or groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedprior.codecs.frame import VALUE_TYPES, Frame, PayloadError, schema_of, to_numpy, to_tensor
from fedprior.core import Params, Schema

CODEC = 2


@dataclass(frozen=True)
class Sparse:
    """Bytes shrink with the product of the kept rows and columns.

    Attributes:
        value_type: "float32", or "float64" for runs in double precision.
    """

    value_type: str = "float32"

    def __post_init__(self) -> None:
        if self.value_type not in VALUE_TYPES:
            raise ValueError(f"value_type must be one of {', '.join(VALUE_TYPES)}, got {self.value_type!r}")

    @property
    def _frame(self) -> Frame:
        return Frame(CODEC, self.value_type)

    def encode(self, message: Params, clients: float) -> bytes:
        """One framed payload."""
        parts = [part for value in message.values() for part in _pieces(to_numpy(value, self._frame.dtype))]
        return self._frame.pack(schema_of(message), clients, b"".join(parts))

    def decode(self, payload: bytes, schema: Schema) -> tuple[Params, float]:
        """The message and its weight."""
        dtype = self._frame.dtype
        longest = sum(_longest(shape, dtype.itemsize) for shape, _ in schema.values())
        body, clients = self._frame.unpack(payload, schema, longest)
        reader = _Reader(body, dtype)
        message = {}
        for name, (shape, torch_dtype) in schema.items():
            message[name] = to_tensor(name, _values(reader, name, shape), torch_dtype)
        if reader.start != len(body):
            raise PayloadError(f"{len(body) - reader.start} bytes are left over")
        return message, clients


def _longest(shape: tuple[int, ...], itemsize: int) -> int:
    masks = sum((n + 7) // 8 for n in shape[:2])
    return masks + bool(shape) + itemsize * int(np.prod(shape, dtype=np.int64))


def _pieces(values: np.ndarray) -> Iterator[bytes]:
    """One tensor's bytes."""
    if values.ndim == 0:
        yield values.tobytes()
        return
    nonzero = values != 0
    kept = values
    for dim in range(min(2, values.ndim)):
        bits = nonzero.any(axis=tuple(d for d in range(values.ndim) if d != dim))
        yield np.packbits(bits).tobytes()
        kept = kept.compress(bits, axis=dim)
    constant = kept.size > 0 and bool((kept == kept.flat[0]).all())
    yield bytes([constant])
    yield (kept.flat[:1] if constant else kept).tobytes()


class _Reader:
    """A body, read from the front; never past its end."""

    def __init__(self, body: memoryview, dtype: np.dtype) -> None:
        self.body, self.dtype, self.start = body, dtype, 0

    def bytes(self, count: int, name: str) -> memoryview:
        if self.start + count > len(self.body):
            raise PayloadError(f"ends within {name}")
        self.start += count
        return self.body[self.start - count : self.start]

    def values(self, count: int, name: str) -> np.ndarray:
        return np.frombuffer(self.bytes(count * self.dtype.itemsize, name), self.dtype)

    def bits(self, count: int, name: str) -> np.ndarray:
        packed = np.frombuffer(self.bytes((count + 7) // 8, name), np.uint8)
        if np.unpackbits(packed)[count:].any():
            raise PayloadError(f"mask of {name} has bits beyond its {count} units")
        return np.unpackbits(packed, count=count).astype(bool)


def _values(reader: _Reader, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor's values, zeros included."""
    if not shape:
        return reader.values(1, name).reshape(())
    bits = [reader.bits(n, name) for n in shape[:2]]
    kind = reader.bytes(1, name)[0]
    if kind > 1:
        raise PayloadError(f"kind {kind} of {name} is unknown")
    kept = tuple(int(b.sum()) for b in bits) + shape[2:]
    size = int(np.prod(kept, dtype=np.int64))
    values = reader.values(1 if kind else size, name)
    out = np.zeros(shape, reader.dtype)
    if size:
        out[np.ix_(*bits)] = values[0] if kind else values.reshape(kept)
    return out
