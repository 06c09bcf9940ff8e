"""Messages between a process and its fork: long ones by way of shared memory, which a pipe would carry in 64 KiB bits.

One side writes into the box, and writes again only when the other has answered: a worker's answer is read before the
worker is told what comes next.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

SIZE = 64 << 20  # of address space: pages take memory when they are first written
LONG = 1 << 16
_HERE = b"@"  # no pickle begins like this


@dataclass
class Mailbox:
    """Memory that this process and its forks share."""

    memory: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, SIZE))

    def send(self, pipe: Connection, message: bytes) -> None:
        """Into the box, with a note in the pipe, or into the pipe if it is short, or longer than the box."""
        if not LONG < len(message) <= SIZE:
            return pipe.send_bytes(message)
        self.memory[: len(message)] = message
        return pipe.send_bytes(_HERE + len(message).to_bytes(8, "little"))

    def receive(self, pipe: Connection) -> bytes:
        """The next message."""
        message = pipe.recv_bytes()
        return self.memory[: int.from_bytes(message[1:], "little")] if message.startswith(_HERE) else message
