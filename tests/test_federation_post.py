"""How the server waits for its nodes: each is heard once, as it answers, or is late; time is a clock of the test's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import pytest

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from fedprior.federation import post

SECONDS, POLL = 10.0, 1.0
CASES: dict[str, tuple[dict[int, list[float]], list[Any]]] = {  # node -> when its answers come; the nodes, as heard
    "as they come": ({1: [3.5], 2: [0.5], 3: [7.0]}, [2, 1, 3]),
    "at once": ({1: [0.0], 2: [0.0]}, [1, 2]),
    "nobody asked": ({}, []),
    "twice in one look": ({1: [2.2, 2.4], 2: [5.0]}, [1, 2]),
    "again at a later look": ({1: [2.0, 4.0], 2: [6.0]}, [1, 2]),
    "never": ({1: [3.0], 2: []}, [1, "late 2"]),
    "past the deadline": ({1: [10.5], 2: [9.0], 3: [11.0]}, [2, "late 1", "late 3"]),
    "nobody": ({1: [], 2: []}, ["late 1", "late 2"]),
}


class Clocked:
    """A Post whose messages are answered at set times, and the clock that is slept on."""

    def __init__(self, times: Mapping[int, list[float]]) -> None:
        self.times, self.now, self.looked = {n: list(t) for n, t in times.items()}, 0.0, 0

    def nodes(self) -> set[int]:
        return set(self.times)

    def send(self, number: int, blobs: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        assert (number, seconds) == (7, SECONDS)
        return {f"to {node}": node for node in blobs}

    def collect(self, messages: Collection[str]) -> list[tuple[str, bytes | post.Failure]]:
        """Answers to any message that was ever sent, also those that were not asked about: a Post may be worse."""
        self.looked += 1
        came = [(t, n) for n, times in self.times.items() for t in times if t <= self.now]
        for t, n in came:
            self.times[n].remove(t)
        return [(f"to {n}", b"from %d" % n) for _, n in sorted(came)]

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds == POLL
        self.now += seconds
        assert self.now < 10 * SECONDS, "it waits for ever"


@pytest.mark.parametrize("name", CASES)
def test_each_node_is_heard_once_or_late(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the look at which the last one has answered, or at the deadline."""
    times, want = CASES[name]
    clock = Clocked(times)
    monkeypatch.setattr(post, "time", clock)
    heard: list[Any] = []
    for node, answer in post.answers(clock, 7, dict.fromkeys(times, b""), SECONDS, POLL):
        if isinstance(answer, post.Failure):
            assert (answer.status, answer.reason) == ("late", "no answer within 10 s")
            heard.append(f"late {node}")
        else:
            assert answer == b"from %d" % node
            heard.append(node)
    assert heard == want
    firsts = [min(t, default=math.inf) for t in times.values()]
    last_look = math.ceil(min(SECONDS, max(firsts, default=0.0)) / POLL) * POLL
    assert clock.now == last_look and clock.looked <= SECONDS / POLL
