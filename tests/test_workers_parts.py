"""What the engines of processes are made of: Auto's choice, windows, mailboxes, and costs of clients."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedprior.engines import Auto, Workers, auto, costs, mailbox, workers
from fedprior.round import Upload
from fedprior.store import MemoryStore
from worker_calls import MARKS, nobody_left

pytestmark = MARKS


@dataclass
class Told:
    """A work whose clients take the seconds that it is told; those of no seconds have dropped out."""

    seconds: dict[int, float]
    store: MemoryStore = field(default_factory=MemoryStore)

    def client(self, index: int) -> Upload:
        taken = self.seconds.get(index, 0.0)
        time.sleep(taken)
        return Upload(index, "", 1, "ok" if taken else "dropped", 0, seconds=taken)

    def receive(self, upload: Upload) -> None:
        return None

    def changes(self) -> None:
        return None

    def changed(self, changes: None) -> Told:
        return self


def chosen(*rounds: dict[int, float]) -> list[str]:
    """The first word of what Auto has chosen after each round of eight clients."""
    engine, store, words = Auto(), MemoryStore(), []
    for seconds in rounds:
        engine.map_sum(Told(seconds, store), range(8))
        words.append(engine.choice.split(",")[0].split(":")[0])
    engine.close()
    return words


SLOW, QUICK, NOBODY = dict.fromkeys(range(8), 0.01), dict.fromkeys(range(8), 1e-5), {}
CHOICES = {
    "slow": ([SLOW], ["workers"]),
    "quick": ([QUICK, QUICK], ["loop", "loop"]),
    "nobody-answers": ([NOBODY, SLOW], ["", "workers"]),
    "the-first-drop-out": ([{3: 0.01, 5: 0.01, 6: 0.01}], ["workers"]),
    "one-answers": ([{3: 0.01}, SLOW], ["", "workers"]),
    "the-first-are-small": ([QUICK | {7: 0.1}, SLOW], ["workers", "workers"]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_auto_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "cores", lambda: 2)
    monkeypatch.setattr(auto, "worth", lambda work, cohort: (0, ""))  # nothing to stack
    monkeypatch.setattr(auto, "WORTH", 0.02)  # seconds of a round
    rounds, words = CHOICES[name]
    assert chosen(*rounds) == words


def test_windows_lose_nobody_and_bound_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 2: however slow the first client, no more than two windows wait to be received behind it."""
    monkeypatch.setattr(workers, "WINDOW", 1)
    engine, started, order = Workers(2), list[int](), [5, 3, *range(10, 25)]
    start = workers._Worker.start

    def counted(self: Any, index: int, stored: bool) -> None:
        started.append(index)
        start(self, index, stored)

    monkeypatch.setattr(workers._Worker, "start", counted)
    with nobody_left():
        received = 0
        for received, upload in enumerate(engine.uploads(Told({5: 0.2}), order), start=1):
            assert upload.index == order[received - 1]
            assert len(started) - (received - 1) <= 2 * 2
        engine.close()
    assert received == len(order) and sorted(started) == sorted(order)
    assert len(engine.costs.seconds) == len(order)


@pytest.mark.parametrize("size", [10, 11, 99, 100, 101, 300])
def test_a_message_arrives_whole_by_the_box_or_the_pipe(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "LONG", 10)
    monkeypatch.setattr(mailbox, "SIZE", 100)
    here, there = multiprocessing.Pipe()
    box, message = mailbox.Mailbox(), bytes(range(1, 251)) * 2
    box.send(here, message[:size])
    assert box.receive(there) == message[:size]


def test_costs_put_the_dearest_first_and_forget_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MOST", 3)
    seen = costs.Costs()
    for index, seconds in [(7, 1.0), (4, 3.0), (9, 2.0), (7, 5.0), (2, 4.0)]:  # 7 is seen again, so 4 is the oldest
        seen.saw(index, seconds)
    assert seen.seconds == {9: 2.0, 7: 5.0, 2: 4.0}
    assert seen.longest_first([9, 4, 2, 7, 8]) == [4, 8, 7, 2, 9]


def test_counts() -> None:
    with pytest.raises(ValueError, match="count must be at least 1"):
        Workers(0)
    assert pickle.loads(pickle.dumps(Workers(2))).count == 2
