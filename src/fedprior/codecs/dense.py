"""Every value, one after the other, in the order of the schema."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedprior.codecs.frame import Frame, schema_of, to_numpy, to_tensor
from fedprior.codecs.quantized import Noise, coding, exact
from fedprior.codecs.reader import PayloadError
from fedprior.core import Params, Schema

CODEC = 1


@dataclass(frozen=True)
class Dense:
    """Bytes = header + (bytes a value) x (number of values), before the entropy coder.

    Attributes:
        value_type: "float32", or "float64" for runs in double precision; or, for tensors of two dimensions and more,
            "bfloat16", or "int8", "int4", "int2" with unbiased stochastic rounding (quantized.py).
        entropy: "none", "zlib" or "zstd" (entropy.py).
        seed: of the noise of stochastic rounding; no other value type uses it.
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
        body = b"".join(coding(self.value_type, values.shape).write(values, noise) for values in arrays)
        return self._frame.pack(schema_of(message), clients, body)

    @property
    def plain(self) -> bool:
        """Are bodies the values as they are? Then `encode_rows` and `decode_rows` do many messages at once."""
        return self.entropy == "none" and exact(self.value_type) is coding(self.value_type, (1 << 20, 1 << 20))

    def encode_rows(self, messages: Params, clients: Sequence[float]) -> list[bytes]:
        """`encode` of each row: tensors have a first dimension of messages, and `clients` as many numbers."""
        dtype, rows = exact(self.value_type).dtype, len(clients)
        schema = schema_of({k: v[0] for k, v in messages.items()})
        bodies = np.concatenate([to_numpy(v, dtype).reshape(rows, -1) for v in messages.values()], axis=1)
        pack = self._frame.pack
        return [pack(schema, count, body.data.cast("B")) for count, body in zip(clients, bodies, strict=True)]

    def decode_rows(self, payloads: Sequence[bytes], schema: Schema) -> tuple[Params, list[float]]:
        """`decode` of each payload, the messages stacked; a PayloadError if there is anything wrong with one."""
        dtype = exact(self.value_type).dtype
        sizes = [math.prod(shape) for shape, _ in schema.values()]
        found = [self._frame.unpack(p, schema, sum(sizes) * dtype.itemsize) for p in payloads]
        bodies = [reader.bytes(sum(sizes) * dtype.itemsize, "the message") for reader, _ in found]
        every = np.frombuffer(b"".join(bodies), dtype).reshape(len(payloads), sum(sizes))
        if not np.isfinite(every.sum()):  # quicker than each value; a sum that overflows is looked at more closely
            raise PayloadError("some values may not be finite")
        parts = np.split(every, np.cumsum(sizes)[:-1], axis=1)
        message = {}
        for (name, (shape, torch_dtype)), part in zip(schema.items(), parts, strict=True):
            own = torch.from_numpy(part.astype(dtype.newbyteorder("=")))
            message[name] = own.to(torch_dtype).reshape(len(payloads), *shape)
        return message, [clients for _, clients in found]

    def decode(self, payload: bytes, schema: Schema) -> tuple[Params, float]:
        """The message and its weight."""
        longest = sum(coding(self.value_type, shape).size(shape) for shape, _ in schema.values())
        reader, clients = self._frame.unpack(payload, schema, longest)
        message = {}
        for name, (shape, torch_dtype) in schema.items():
            values = coding(self.value_type, shape).read(reader, name, shape)
            message[name] = to_tensor(name, values, torch_dtype)
        reader.finish()
        return message, clients
