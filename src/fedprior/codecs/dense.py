"""Every value, one after the other, in the order of the schema."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedprior.codecs.frame import VALUE_TYPES, Frame, PayloadError, entries, schema_of, to_numpy, to_tensor
from fedprior.core import Params, Schema

CODEC = 1


@dataclass(frozen=True)
class Dense:
    """Bytes = header + (bytes a value) x (number of values).

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
        body = b"".join(to_numpy(value, self._frame.dtype).tobytes() for value in message.values())
        return self._frame.pack(schema_of(message), clients, body)

    def decode(self, payload: bytes, schema: Schema) -> tuple[Params, float]:
        """The message and its weight."""
        dtype = self._frame.dtype
        exact = entries(schema) * dtype.itemsize
        body, clients = self._frame.unpack(payload, schema, exact)
        if len(body) != exact:
            raise PayloadError(f"body of {len(body)} bytes, this schema needs {exact}")
        message, start = {}, 0
        for name, (shape, torch_dtype) in schema.items():
            size = math.prod(shape)
            values = np.frombuffer(body, dtype, size, start).reshape(shape)
            message[name] = to_tensor(name, values, torch_dtype)
            start += size * dtype.itemsize
        return message, clients
