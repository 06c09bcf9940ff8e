"""Kept units as bit masks, then their values: nothing is sent for a unit whose values are all zero.

For each tensor, in the order of the schema:

    row bits      one bit per index of dimension 0, set where the slice has a nonzero
    column bits   the same for dimension 1, if there is one
    kind          one byte: 1 if all kept values are equal (as those of a mask are), else 0
    values        one exact value (kind 1), or all of the kept rows and columns in their coding (kind 0)

A scalar is its value alone. Lossless up to the value type and the sign of zero: the zeros that are not sent are
the zeros that are decoded, so the codec needs to know nothing of gates or groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedprior.codecs.frame import Bytes, Frame, schema_of, to_numpy, to_tensor
from fedprior.codecs.quantized import Noise, coding, exact
from fedprior.codecs.reader import PayloadError, Reader
from fedprior.core import Params, Schema

CODEC = 2


@dataclass(frozen=True)
class Sparse:
    """Bytes shrink with the product of the kept rows and columns.

    Attributes:
        value_type, entropy, seed: as in Dense; a coding sees the kept rows and columns only.
    """

    value_type: str = "float32"
    entropy: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self._frame  # which checks the names

    @property
    def _frame(self) -> Frame:
        return Frame(CODEC, self.value_type, self.entropy)

    def encode(self, message: Params, clients: float) -> bytes:
        """One framed payload."""
        arrays = [to_numpy(value, exact(self.value_type).dtype) for value in message.values()]
        noise = Noise(arrays, self.seed)
        parts = [part for values in arrays for part in self._pieces(values, noise)]
        return self._frame.pack(schema_of(message), clients, *parts)

    def decode(self, payload: bytes, schema: Schema) -> tuple[Params, float]:
        """The message and its weight."""
        longest = sum(self._longest(shape) for shape, _ in schema.values())
        reader, clients = self._frame.unpack(payload, schema, longest)
        message = {}
        for name, (shape, torch_dtype) in schema.items():
            message[name] = to_tensor(name, self._values(reader, name, shape), torch_dtype)
        reader.finish()
        return message, clients

    def _longest(self, shape: tuple[int, ...]) -> int:
        """The most bytes of one tensor: no unit is dropped, or one value stands for all."""
        masks = sum((n + 7) // 8 for n in shape[:2])
        one = exact(self.value_type).dtype.itemsize
        return masks + bool(shape) + max(one, coding(self.value_type, shape).size(shape))

    def _pieces(self, values: np.ndarray, noise: Noise) -> Iterator[Bytes]:
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
        yield kept.flat[:1].tobytes() if constant else coding(self.value_type, kept.shape).write(kept, noise)

    def _values(self, reader: Reader, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor's values, zeros included."""
        plain = exact(self.value_type)
        if not shape:
            return plain.read(reader, name, shape)
        bits = [reader.mask(n, name) for n in shape[:2]]
        kind = reader.bytes(1, name)[0]
        if kind > 1:
            raise PayloadError(f"kind {kind} of {name} is unknown")
        kept = tuple(int(b.sum()) for b in bits) + shape[2:]
        values = plain.read(reader, name, (1,)) if kind else coding(self.value_type, kept).read(reader, name, kept)
        out = np.zeros(shape, plain.dtype)
        if math.prod(kept):
            out[np.ix_(*bits)] = values
        return out
