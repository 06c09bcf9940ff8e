"""The frame around every payload.

offset  size  field                                             all little-endian
0       4     magic b"FEDP"
4       1     version
5       1     codec
6       1     value type (codes of VALUE_TYPES)
7       1     entropy coder of the body (codes of ENTROPIES; 0 for none)
8       8     schema hash: names, shapes and types of the message
16      8     count: float64, the weight of the clients that the message stands for
24      4     length of the body in bytes, as it travels
28      4     CRC-32 of bytes 0-27 and the body
32      ...   body
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fedprior.codecs import entropy
from fedprior.codecs.reader import PayloadError, Reader
from fedprior.core import Params, Schema

MAGIC, VERSION = b"FEDP", 1
_FIELDS = struct.Struct("<4sBBH8sdI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size

ValueType = Literal["float32", "float64", "bfloat16", "int8", "int4", "int2"]
Bytes = bytes | memoryview
VALUE_TYPES = {name: code for code, name in enumerate(get_args(ValueType), start=1)}


def schema_of(message: Params) -> Schema:
    """Names, shapes and types of a message."""
    return {name: (tuple(value.shape), value.dtype) for name, value in message.items()}


def schema_hash(schema: Schema) -> bytes:
    """8 bytes that differ, with certainty for all practical purposes, when the schemas do."""
    return _digest(tuple(schema.items()))


@lru_cache(maxsize=256)
def _digest(items: tuple[tuple[str, tuple[tuple[int, ...], torch.dtype]], ...]) -> bytes:
    text = "\n".join(f"{name}\0{shape}\0{dtype}" for name, (shape, dtype) in items)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


@dataclass(frozen=True)
class Frame:
    """One codec's frames.

    Attributes:
        codec: the codec's number on the wire.
        value_type: how values are written: a key of VALUE_TYPES.
        entropy: how the body is shrunk: a key of ENTROPIES.
    """

    codec: int
    value_type: str = "float32"
    entropy: str = "none"

    def __post_init__(self) -> None:
        if self.value_type not in VALUE_TYPES:
            raise ValueError(f"value_type must be one of {', '.join(VALUE_TYPES)}, got {self.value_type!r}")
        entropy.check(self.entropy)

    @property
    def _code(self) -> int:
        return VALUE_TYPES[self.value_type] | entropy.ENTROPIES[self.entropy] << 8

    def pack(self, schema: Schema, clients: float, *body: Bytes) -> bytes:
        """Header and body, whose parts are copied once."""
        parts = body if self.entropy == "none" else (entropy.shrink(self.entropy, b"".join(body)),)
        length = sum(map(len, parts))
        fields = _FIELDS.pack(MAGIC, VERSION, self.codec, self._code, schema_hash(schema), clients, length)
        checksum = zlib.crc32(fields)
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        return b"".join([fields, _CRC.pack(checksum), *parts])

    def longest(self, body: int) -> int:
        """The most bytes of a payload whose body has so many before the entropy coder."""
        return HEADER_BYTES + entropy.longest_coded(self.entropy, body)

    def unpack(self, payload: bytes, schema: Schema, longest: int) -> tuple[Reader, float]:
        """The body and the count; `longest` is the most bytes that a body of this schema can have."""
        most = self.longest(longest)
        if len(payload) < HEADER_BYTES:
            raise PayloadError(f"{len(payload)} bytes, and a header alone has {HEADER_BYTES}")
        if len(payload) > most:
            raise PayloadError(f"{len(payload)} bytes, at most {most} fit this schema")
        fields, body = payload[: _FIELDS.size], memoryview(payload)[HEADER_BYTES:]
        magic, version, codec, code, digest, clients, length = _FIELDS.unpack(fields)
        if magic != MAGIC:
            raise PayloadError(f"starts with {magic!r} instead of {MAGIC!r}")
        expected = (VERSION, self.codec, self._code)
        if (version, codec, code) != expected:
            raise PayloadError(f"(version, codec, value type) is {(version, codec, code)}, expected {expected}")
        if length != len(body):
            raise PayloadError(f"body of {len(body)} bytes, and the header says {length}")
        if zlib.crc32(body, zlib.crc32(fields)) != _CRC.unpack_from(payload, _FIELDS.size)[0]:
            raise PayloadError("checksum differs: the payload was changed on its way")
        if digest != schema_hash(schema):
            raise PayloadError("made for another schema: names, shapes or types differ")
        if not (math.isfinite(clients) and clients >= 0):
            raise PayloadError(f"count of clients is {clients}")
        return Reader(entropy.expand(self.entropy, body, longest)), clients


def to_numpy(value: Tensor, dtype: np.dtype) -> np.ndarray:
    """A tensor's values in wire type; overflow becomes infinite and is refused by the receiver."""
    with np.errstate(over="ignore"):
        value = value.detach().cpu()
        wide = value.float() if value.dtype == torch.bfloat16 else value  # NumPy has no bfloat16
        return wide.numpy().astype(dtype, copy=False)


def to_tensor(name: str, values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Finite values as a tensor of their own."""
    tensor = torch.from_numpy(values.astype(values.dtype.newbyteorder("="))).to(dtype)
    if not torch.isfinite(tensor.sum()):  # after the conversion, which may overflow, as a sum of finite values may
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise PayloadError(f"{bad} of {tensor.numel()} values of {name} are not finite")
    return tensor
