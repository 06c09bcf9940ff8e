"""Runs on worker processes, and a look at the processes that live."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fedprior as fp
from cases import classification_clients
from fedprior.engines import Workers

MARKS = [
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are looked up in /proc"),
    pytest.mark.timeout(60),
]
CLIENTS = classification_clients((6, 5, 9, 4, 7, 8))
MODEL = fp.models.mlp(4, (6,), 3)


def run(clients: Any = CLIENTS, engine: Any = None, **fields: Any) -> fp.Result:
    fields = {"algorithm": fp.fedavg(0.1, batch_size=4), "model": MODEL, "rounds": 3, "cohort": 5} | fields
    return fp.run(clients=clients, engine=engine or Workers(2), **fields)


def children(of: int | None = None) -> set[int]:
    """The living processes whose parent is `of`, by default this one; those that wait to be reaped do not live."""
    found, of = set(), of or os.getpid()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if int(parent) == of and state != "Z":
            found.add(int(stat.parent.name))
    return found


@contextmanager
def nobody_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
