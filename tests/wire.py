"""Messages and frames for the tests of the wire."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import zstandard
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedprior import Params
from fedprior.codecs import Dense, Sparse, TopK
from fedprior.codecs.frame import HEADER_BYTES

DTYPES = {"float32": torch.float32, "float64": torch.float64}
HEADER = struct.Struct("<4sBBH8sdI")  # the layout of the docstring of codecs/frame.py, written down again
BITS = {"bfloat16": 16, "int8": 8, "int4": 4, "int2": 2}


@dataclass(frozen=True)
class Case:
    codec: Dense | Sparse | TopK
    lossless_zero: bool = False

    def __str__(self) -> str:
        fraction = f"{self.codec.fraction:g}" if isinstance(self.codec, TopK) else "none"
        parts = [type(self.codec).__name__, fraction, self.codec.value_type, self.codec.entropy]
        return "-".join(part for part in parts if part != "none")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.codec.value_type, torch.float32)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of the values of one tensor."""
        count, bits = math.prod(shape), BITS.get(self.codec.value_type)
        if bits is None or len(shape) < 2:
            return self.itemsize * count
        steps = 4 * shape[0] if bits <= 8 else 0
        return min(steps + math.ceil(count * bits / 8), self.itemsize * count)

    def length(self, message: Params) -> int:
        """The length of a payload before the entropy coder, by the codec's formula: one plain loop over entries."""
        if isinstance(self.codec, TopK):
            return HEADER_BYTES + self._topk(message)
        dense = isinstance(self.codec, Dense)
        return HEADER_BYTES + sum(self.size(v.shape) if dense else self._sparse(v) for v in message.values())

    def _topk(self, message: Params) -> int:
        kept = largest(message, self.codec.fraction)
        large = [v for v in message.values() if v.ndim >= 2]
        entries, positions, start, values = sum(v.numel() for v in large), [], 0, 0
        for name, value in message.items():
            if value.ndim >= 2:
                positions += [start + i for i in kept[name]]
                start += value.numel()
                values += self.size((1, len(kept[name])))
        bitmap, gaps = math.ceil(entries / 8), 0
        for before, after in pairwise([-1, *positions]):
            gaps += max(1, math.ceil((after - before - 1).bit_length() / 7))
        shortest = min(bitmap, gaps) if 8 * len(positions) < entries else bitmap
        return self.itemsize * sum(v.numel() for v in message.values() if v.ndim < 2) + 1 + shortest + values

    def _sparse(self, value: torch.Tensor) -> int:
        if value.ndim == 0:
            return self.itemsize
        kept = [{int(i[d]) for i in value.nonzero()} if d < 2 else set(range(n)) for d, n in enumerate(value.shape)]
        rows = [torch.tensor(sorted(k), dtype=torch.int64) for k in kept]
        inside = value[torch.meshgrid(*rows, indexing="ij")].flatten().tolist()
        masks = sum(math.ceil(n / 8) for n in value.shape[:2])
        constant = inside and len(set(inside)) == 1
        return masks + 1 + (self.itemsize if constant else self.size(tuple(len(r) for r in rows)))

    def message(self) -> Params:
        """A scalar, a vector with zeros, a matrix with dead rows and columns, a mask, and an image filter."""
        matrix = torch.arange(1.0, 21, dtype=self.dtype).view(4, 5)
        matrix[1], matrix[:, 3] = 0, 0
        return {
            "scalar": torch.tensor(2.5, dtype=self.dtype),
            "vector": torch.tensor([0, -1.5, 0, 3, 0, 0, 0, 0, 7], dtype=self.dtype),
            "matrix": matrix,
            "mask": torch.tensor([[1, 0, 1]], dtype=self.dtype),
            "filter": torch.linspace(-1, 1, 36, dtype=self.dtype).view(2, 2, 3, 3),
            "zeros": torch.zeros(3, 2, dtype=self.dtype),
        }


def largest(message: Params, fraction: float) -> dict[str, list[int]]:
    """The flat indices that top-k keeps of each tensor of two dimensions and more: by sorting (magnitude, place)."""
    large = [(name, v.flatten().tolist()) for name, v in message.items() if v.ndim >= 2]
    entries = sorted((-abs(x), place, i) for place, (_, v) in enumerate(large) for i, x in enumerate(v))
    kept: list[list[int]] = [[] for _ in large]
    for _, place, i in entries[: max(1, round(fraction * len(entries)))]:
        kept[place].append(i)
    return {name: sorted(k) for (name, _), k in zip(large, kept, strict=True)}


EXACT = [Case(Dense(), True), Case(Dense("float64"), True), Case(Sparse()), Case(Sparse("float64"))]
EXACT += [Case(TopK(1.0), True)]
KINDS = (Dense, Sparse, partial(TopK, 1.0))
SHRUNK = [Case(Dense("float64", "zlib"), True), Case(Sparse(entropy="zlib")), Case(Sparse(entropy="zstd"))]
ROUNDED = [Case(kind(value_type)) for kind in KINDS for value_type in BITS]
CASES = [
    *EXACT,
    *SHRUNK,
    *(Case(Dense(v)) for v in ("bfloat16", "int4")),
    *(Case(Sparse(v)) for v in ("int8", "int2")),
    *(Case(Sparse("int8", entropy)) for entropy in ("zlib", "zstd")),
    *(Case(TopK(*fields)) for fields in ((0.1, "float64"), (0.05, "int4", "zstd"), (0.2, "int8", "zlib"))),
]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bit patterns: tells -0.0 from 0.0."""
    integers = torch.int32 if a.dtype == torch.float32 else torch.int64
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


def seal(payload: bytes) -> bytes:
    """The same frame with a length and a checksum that fit its body: what a hostile client would send."""
    fields = bytearray(payload[: HEADER.size])
    body = payload[HEADER_BYTES:]
    fields[HEADER.size - 4 :] = struct.pack("<I", len(body))
    return bytes(fields) + struct.pack("<I", zlib.crc32(body, zlib.crc32(bytes(fields)))) + body


def with_field(payload: bytes, position: int, value: object) -> bytes:
    """The frame with one header field replaced, and sealed again."""
    fields = list(HEADER.unpack(payload[: HEADER.size]))
    fields[position] = value
    head = HEADER.pack(*fields)
    body = payload[HEADER_BYTES:]
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def with_body(payload: bytes, body: bytes) -> bytes:
    return seal(payload[:HEADER_BYTES] + body)


def shrunk(case: Case, body: bytes) -> bytes:
    """The body as the case's entropy coder writes it."""
    if case.codec.entropy == "zlib":
        return zlib.compress(body)
    return zstandard.compress(body) if case.codec.entropy == "zstd" else body


def expanded(case: Case, payload: bytes) -> bytes:
    """The body of a valid payload, before its entropy coder."""
    body = payload[HEADER_BYTES:]
    if case.codec.entropy == "zlib":
        return zlib.decompress(body)
    return zstandard.decompress(body) if case.codec.entropy == "zstd" else body


@st.composite
def messages(draw: st.DrawFn, dtype: torch.dtype, largest: float | None = None) -> Params:
    """Up to four tensors of 0 to 4 dimensions (some empty), with rows and columns set to zero."""
    width, message = 8 * dtype.itemsize, {}
    limits = {} if largest is None else {"min_value": -largest, "max_value": largest}
    for index in range(draw(st.integers(1, 4))):
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
        elements = st.floats(allow_nan=False, allow_infinity=False, width=width, **limits) | st.sampled_from(
            [0.0, -0.0, 1.0]
        )
        values = draw(hnp.arrays(np.dtype(f"float{width}"), shape, elements=elements))
        for dim, size in enumerate(shape[:2]):
            for unit in draw(st.sets(st.integers(0, max(size - 1, 0)), max_size=size)):
                if size:
                    values[(slice(None),) * dim + (unit,)] = 0
        message[f"t{index}"] = torch.from_numpy(np.array(values))
    return message
