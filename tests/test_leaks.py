"""Two thousand rounds in the memory of five hundred: nothing is kept but the records.

Records (`Result.history`) grow by design, and a run without `out` has them in memory alone; what they take is measured
in the test and subtracted. The rest must be flat: the slope of the resident memory of the run and its processes, by
least squares over the rounds after the first quarter, below `TOLERANCE`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedprior as fp
from cases import classification_clients, pooled
from fedprior import engines
from fedprior.core import Engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is looked up in /proc"),
]
ROUNDS, WARM, EVERY = 2000, 500, 10
TOLERANCE = 1000  # bytes a round: 2 MB over the whole test, a fortieth of what one kept payload a client would take
CLIENTS = classification_clients((6, 5, 9, 4, 7, 8))
ALGORITHMS = {"fedavg": fp.fedavg(0.01), "topk": fp.topk(0.01, 0.2), "fedsparse": fp.fedsparse(0.01, density=0.5)}
ENGINES: dict[str, Callable[[], Engine]] = {
    "sequential": lambda: engines.Sequential(1),
    "workers": lambda: engines.Workers(2),
    "stacked": lambda: engines.Stacked(),
}


def resident() -> int:
    """Bytes of this process and of its children."""
    pages = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if os.getpid() in (parent, int(stat.parent.name)):
                pages += int((stat.parent / "statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return pages * os.sysconf("SC_PAGE_SIZE")


def size(value: Any, seen: set[int]) -> int:
    """Bytes of a value and of what it holds, each object once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    inside: list[Any] = []
    if is_dataclass(value):
        inside = [getattr(value, f.name) for f in fields(value)] + [vars(value)]
    elif isinstance(value, dict):
        inside = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        inside = list(value)
    return sys.getsizeof(value) + sum(size(v, seen) for v in inside)


PAIRS = [(name, engine) for name in ALGORITHMS for engine in ENGINES if engine != "stacked" or name == "fedavg"]


@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_memory_is_flat(name: str, engine: str) -> None:
    at: list[int] = []
    bytes_at: list[int] = []

    def look(record: fp.Round) -> None:
        if record.number % EVERY == 0:
            at.append(record.number)
            bytes_at.append(resident())

    result = fp.run(
        ALGORITHMS[name],
        fp.models.mlp(4, (300,), 3),
        CLIENTS,
        rounds=ROUNDS,
        cohort=4,
        test=pooled(CLIENTS),
        engine=ENGINES[engine](),
        on_round=look,
    )
    assert len(result.history) == ROUNDS
    records = size(result.history, set()) / ROUNDS
    late = np.array(at) > WARM
    slope = np.polyfit(np.array(at)[late], np.array(bytes_at)[late], 1)[0]
    assert slope - records < TOLERANCE, f"{slope:.0f} bytes a round, of which records are {records:.0f}"
