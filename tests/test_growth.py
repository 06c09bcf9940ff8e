"""What a round holds grows neither with its cohort nor with the population: it passes on what clients send.

Held are the storages of all tensors and all that Python has allocated, looked at whenever a client is asked for and
whenever an upload is received: bytes that are counted, not the system's pages. A client's examples, its upload and its
statistics take `CLIENT` bytes each, of which an engine may hold as many as its windows have places; what stays is a
record, of `RECORD` bytes at most.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fedprior as fp
from cases import classification_clients
from fedprior import engines
from fedprior.core import Engine
from fedprior.engines import auto, workers
from fedprior.rng import generator
from fedprior.round import RoundWork

HIDDEN = 2000
CLIENT = 4 * (4 * HIDDEN + HIDDEN + 3 * HIDDEN + 3)  # bytes: float32 weights and biases
RECORD = 2000
FEW, MANY = 10, 80
WINDOW = 2

ENGINES: dict[str, tuple[Callable[[], Engine], int]] = {  # and how many clients it may hold beside one another
    "sequential": (lambda: engines.Sequential(1), 1),
    "workers": (lambda: engines.Workers(2), 2 * 2 * WINDOW),  # two windows, each of so many a worker
    "stacked": (lambda: engines.Stacked(2 * WINDOW), 2 * WINDOW),
    "auto, workers": (engines.Auto, 2 * 2 * WINDOW),
}


def held() -> int:
    """Bytes of the storages of the tensors made since `counting` began, and of Python's objects."""
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values()) + tracemalloc.get_traced_memory()[0]


@contextmanager
def counting() -> Iterator[None]:
    """Looks are quick: what is there already is passed over."""
    gc.collect()
    gc.freeze()
    tracemalloc.start(1)
    try:
        yield
    finally:
        tracemalloc.stop()
        gc.unfreeze()


def run(engine: Engine, cohort: int, population: Any, **fields: Any) -> None:
    algorithm, model = fp.fedavg(0.01, batch_size=None), fp.models.mlp(4, (HIDDEN,), 3)
    fp.run(algorithm, model, population, rounds=2, cohort=cohort, engine=engine, **fields)


def most_held(engine: Engine, cohort: int, population: int) -> int:
    """The most that this process held in the second round; its workers may not grow by more than twelve clients."""
    parent, most, number = os.getpid(), 0, 1
    first: dict[int, int] = {}
    receive = RoundWork.receive

    def make(index: int) -> fp.Client:
        nonlocal most
        if os.getpid() == parent:
            most = max(most, held()) if number == 2 else most
        else:
            now = held()
            grown = now - first.setdefault(os.getpid(), now)
            assert grown < 12 * CLIENT, f"a worker holds {grown / CLIENT:.1f} clients more than at first"
        rng = generator(0, index, "growth")
        x, y = torch.randn(8, 4, generator=rng), torch.randint(3, (8,), generator=rng)
        held_out = fp.Examples(torch.zeros(CLIENT // 16, 4), torch.zeros(CLIENT // 16, dtype=torch.int64))
        return fp.Client(index, f"client-{index}", fp.Examples(x, y), held_out)

    def received(self: Any, upload: Any) -> Any:
        nonlocal most
        stats = receive(self, upload)
        most = max(most, held()) if number == 2 else most
        return stats

    def next_round(record: fp.Round) -> None:
        nonlocal number
        number += 1

    with pytest.MonkeyPatch.context() as patch, counting():
        patch.setattr(RoundWork, "receive", received)
        run(engine, cohort, fp.data.LazyPopulation(population, make), on_round=next_round)
    return most


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("cohorts", "populations"), [((FEW, MANY), (MANY, MANY)), ((FEW, FEW), (FEW, 1_000_000))])
def test_what_a_round_holds_is_independent_of_cohort_and_population(
    name: str, cohorts: tuple[int, int], populations: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at the few, and at the many, whose records are longer; before, at what is imported and set up once."""
    monkeypatch.setattr(workers, "WINDOW", WINDOW)
    if name.startswith("auto"):
        monkeypatch.setattr(auto, "WORTH", 0.0)
        monkeypatch.setattr(auto, "worth", lambda work, cohort: (0, ""))  # nothing to stack
    make, places = ENGINES[name]
    run(make(), FEW, classification_clients((8,) * FEW))
    few, many = (most_held(make(), c, p) for c, p in zip(cohorts, populations, strict=True))
    assert many - few < 3 * places * CLIENT + RECORD * 2 * (cohorts[1] - cohorts[0])
