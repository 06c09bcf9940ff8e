"""Reading a body from the front, and the one error for anything that is not a valid payload."""

from __future__ import annotations

import numpy as np


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


class Reader:
    """A body, read from the front; never past its end. `name` is the tensor that an error tells."""

    def __init__(self, body: bytes | memoryview) -> None:
        self.body, self.start = memoryview(body), 0

    def bytes(self, count: int, name: str) -> memoryview:
        """The next `count` bytes."""
        if self.start + count > len(self.body):
            raise PayloadError(f"body ends within {name}")
        self.start += count
        return self.body[self.start - count : self.start]

    def array(self, dtype: str | np.dtype, count: int, name: str) -> np.ndarray:
        """The next `count` numbers: a view, not a copy."""
        return np.frombuffer(self.bytes(count * np.dtype(dtype).itemsize, name), dtype)

    def mask(self, count: int, name: str) -> np.ndarray:
        """The next `count` bits, which fill whole bytes, as booleans."""
        packed = self.array("u1", (count + 7) // 8, name)
        if np.unpackbits(packed)[count:].any():
            raise PayloadError(f"mask of {name} has bits beyond its {count} units")
        return np.unpackbits(packed, count=count).astype(bool)

    def finish(self) -> None:
        """A PayloadError if something is left."""
        if self.start != len(self.body):
            raise PayloadError(f"{len(self.body) - self.start} bytes of the body are left over")
