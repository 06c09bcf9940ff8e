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

    def varints(self, count: int, longest: int, name: str) -> np.ndarray:
        """The next `count` > 0 numbers as LEB128, in at most `longest` bytes."""
        rest = np.frombuffer(self.body[self.start : self.start + longest], "u1")
        ends = np.flatnonzero(rest < 128)[:count]
        if len(ends) < count:
            raise PayloadError(f"body ends within {name}, or they are too long")
        digits = self.array("u1", int(ends[-1]) + 1, name)
        starts = np.concatenate([[0], ends[:-1] + 1])
        place = np.arange(digits.size) - np.repeat(starts, ends + 1 - starts)
        if int(place.max()) > 8:
            raise PayloadError(f"a number of {name} has more than 63 bits")
        return np.add.reduceat((digits & 127).astype(np.int64) << 7 * place, starts)

    def finish(self) -> None:
        """A PayloadError if something is left."""
        if self.start != len(self.body):
            raise PayloadError(f"{len(self.body) - self.start} bytes of the body are left over")
