"""The frame around every payload, and the one error for anything that is not a valid payload.

offset  size  field                                             all little-endian
0       4     magic b"FEDP"
4       1     version
5       1     codec
6       2     value type (codes of VALUE_TYPES)
8       8     schema hash: names, shapes and types of the message
16      8     count: float64, the weight of the clients that the message stands for
24      4     length of the body in bytes
28      4     CRC-32 of bytes 0-27 and the body
32      ...   body
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedprior.core import Params, Schema

MAGIC, VERSION = b"FEDP", 1
_FIELDS = struct.Struct("<4sBBH8sdI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size

VALUE_TYPES = {"float32": 1, "float64": 2}


class PayloadError(ValueError):
    """A payload that is malformed, torn, meant for another schema, not finite, or too long.

    Attributes:
        reason: what is wrong with it.
        client: the name of the client that sent it, once known.
    """

    def __init__(self, reason: str, client: str | None = None) -> None:
        super().__init__(reason if client is None else f"client {client!r}: {reason}")
        self.reason = reason
        self.client = client


def schema_of(message: Params) -> Schema:
    """Names, shapes and types of a message."""
    return {name: (tuple(value.shape), value.dtype) for name, value in message.items()}


def schema_hash(schema: Schema) -> bytes:
    """8 bytes that differ, with certainty for all practical purposes, when the schemas do."""
    text = "\n".join(f"{name}\0{shape}\0{dtype}" for name, (shape, dtype) in schema.items())
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def entries(schema: Schema) -> int:
    """The number of values in a message."""
    return sum(math.prod(shape) for shape, _ in schema.values())


@dataclass(frozen=True)
class Frame:
    """One codec's frames.

    Attributes:
        codec: the codec's number on the wire.
        value_type: how values are written: a key of VALUE_TYPES.
    """

    codec: int
    value_type: str

    @property
    def dtype(self) -> np.dtype:
        """NumPy's type of the values on the wire."""
        return np.dtype(self.value_type).newbyteorder("<")

    def pack(self, schema: Schema, clients: float, body: bytes) -> bytes:
        """Header and body."""
        code = VALUE_TYPES[self.value_type]
        fields = _FIELDS.pack(MAGIC, VERSION, self.codec, code, schema_hash(schema), clients, len(body))
        return b"".join([fields, _CRC.pack(zlib.crc32(body, zlib.crc32(fields))), body])

    def unpack(self, payload: bytes, schema: Schema, longest: int) -> tuple[memoryview, float]:
        """The body and the count; `longest` is the most bytes that a body of this schema can have."""
        if len(payload) < HEADER_BYTES:
            raise PayloadError(f"{len(payload)} bytes, and a header alone has {HEADER_BYTES}")
        if len(payload) > HEADER_BYTES + longest:
            raise PayloadError(f"{len(payload)} bytes, at most {HEADER_BYTES + longest} fit this schema")
        fields, body = payload[: _FIELDS.size], memoryview(payload)[HEADER_BYTES:]
        magic, version, codec, code, digest, clients, length = _FIELDS.unpack(fields)
        if magic != MAGIC:
            raise PayloadError(f"starts with {magic!r} instead of {MAGIC!r}")
        expected = (VERSION, self.codec, VALUE_TYPES[self.value_type])
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
        return body, clients


def to_numpy(value: Tensor, dtype: np.dtype) -> np.ndarray:
    """A tensor's values in wire type; overflow becomes infinite and is refused by the receiver."""
    with np.errstate(over="ignore"):
        return value.detach().cpu().numpy().astype(dtype, copy=False)


def to_tensor(name: str, values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Finite values as a tensor of their own."""
    tensor = torch.from_numpy(values.astype(values.dtype.newbyteorder("="))).to(dtype)
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())  # after the conversion, which may overflow
    if bad:
        raise PayloadError(f"{bad} of {tensor.numel()} values of {name} are not finite")
    return tensor
