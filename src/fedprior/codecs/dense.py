"""Every value, one after the other, in the order of the schema."""

from __future__ import annotations

from dataclasses import dataclass

from fedprior.codecs.frame import Frame, schema_of, to_numpy, to_tensor
from fedprior.codecs.quantized import Noise, coding, exact
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
        body = (coding(self.value_type, values.shape).write(values, noise) for values in arrays)
        return self._frame.pack(schema_of(message), clients, *body)

    @property
    def plain(self) -> bool:
        """Are bodies the values as they are, in `value_type`? Then messages of one schema have one length."""
        return self.entropy == "none" and self.value_type in ("float32", "float64")

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
