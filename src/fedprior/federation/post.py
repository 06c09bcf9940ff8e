"""How the server reaches its nodes, in nodes and blobs alone; flower.py has the post that goes over Flower."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Failure:
    """What came in place of a node's blob: `dropped` for an error, `rejected` for what holds none, `late`."""

    status: Literal["dropped", "rejected", "late"]
    reason: str


class Post(Protocol):
    """What carries blobs to the nodes and back."""

    def nodes(self) -> set[int]:
        """Those that are there now."""
        ...

    def send(self, number: int, blobs: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        """One message to each node, in round `number`, waited for `seconds`; the node of each message."""
        ...

    def collect(self, messages: Collection[str]) -> list[tuple[str, bytes | Failure]]:
        """The answers that have come to these messages since the last look, each given once; never waits."""
        ...


def answers(
    post: Post, number: int, blobs: Mapping[int, bytes], seconds: float, poll: float
) -> Iterator[tuple[int, bytes | Failure]]:
    """Send, and give each node's answer as it comes; in the end those that did not come within `seconds`."""
    waiting = post.send(number, blobs, seconds)
    end = time.monotonic() + seconds
    while waiting and time.monotonic() < end:
        for message, answer in post.collect(waiting):
            node = waiting.pop(message, None)
            if node is not None:
                yield node, answer
        if waiting:
            time.sleep(poll)
    for node in waiting.values():
        yield node, Failure("late", f"no answer within {seconds:g} s")
