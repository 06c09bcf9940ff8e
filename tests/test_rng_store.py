"""Randomness by name, and the personal states of clients."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

import fedprior as fp
from cases import classification_clients, equal, redraw, without_seconds
from fedprior import inference, priors, rng
from fedprior.store import DiskStore, MemoryStore
from stateful import Counting

NAMES = [(), (0,), (1,), ("0",), ("1",), (0, 1), (1, 0), ("01",), (0, "1"), (1, 2, "e_step"), (12, "e_step"), (1, 2, 3)]


def test_streams_are_by_name() -> None:
    """The same names give the same stream; other names, orders, types and seeds give others."""
    streams = {}
    for seed in (0, 1, 10):
        for names in NAMES:
            a, b = (torch.rand(4, generator=rng.generator(seed, *names)) for _ in range(2))
            assert torch.equal(a, b)
            c, d = (rng.numpy_generator(seed, *names).random(4) for _ in range(2))
            assert (c == d).all()
            streams[seed, names] = (*a.tolist(), *c.tolist())
            assert 0 <= rng.derive(seed, *names) < 2**63
    assert len(set(streams.values())) == len(streams)


def test_streams_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """Nothing of Python's salted hashes: derive is a function of the text, known to no other function than blake2."""
    import hashlib

    text = b"3\0int:5\0str:e_step"
    want = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
    assert rng.derive(3, 5, "e_step") == want


class Dropping(nn.Module):
    """A model whose layers draw from PyTorch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize(
    "algorithm", [fp.fedavg(0.1), fp.fedsparse(0.1, density=0.5), fp.fedadam()], ids=lambda a: a.name
)
def test_global_generators_are_left_as_they_were(algorithm: fp.Algorithm) -> None:
    """And have no influence: with other global states the run has the same bits."""
    clients, model, results = classification_clients((6, 7, 5)), redraw(Dropping()), []
    for offset in (0, 1):
        torch.rand(5 + offset)
        np.random.random(3 + offset)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1:3]  # noqa: NPY002
        results.append(fp.run(algorithm, model, clients, rounds=2, cohort=2).params)
        after = torch.get_rng_state(), np.random.get_state()[1:3]  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert (before[1][0] == after[1][0]).all() and before[1][1] == after[1][1]
    assert equal(*results)


def test_dropout_draws_differ_between_clients_and_rounds() -> None:
    """Dropout is on while clients train: with it the run is another run, and the seed decides which."""
    clients, model = classification_clients((6, 6)), redraw(Dropping())
    runs = [fp.run(fp.fedavg(0.5), model, clients, rounds=2, seed=s).params for s in (0, 1)]
    assert not equal(*runs)
    still = redraw(Dropping())
    still.layers[2].p = 0.0
    assert not equal(runs[0], fp.run(fp.fedavg(0.5), still, clients, rounds=2, seed=0).params)


class Stores(RuleBasedStateMachine):
    """Memory and disk against a plain dict {client: {round: value}}."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.stores = [MemoryStore(), DiskStore(self.folder)]
        self.model: dict[int, dict[int, float]] = {}
        self.round, self.committed, self.value = 1, 0, 0.0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(index=st.integers(0, 3))
    def save(self, index: int) -> None:
        self.value += 1
        for store in self.stores:
            state = {"x": torch.full((2,), self.value), "n": torch.tensor(self.value)}
            store.save(index, self.round, state)
            state["x"] += 100  # the store keeps what was saved, not what became of it
        self.model.setdefault(index, {})[self.round] = self.value

    @rule()
    def next_round(self) -> None:
        self.round += 1

    @precondition(lambda self: self.round > 1)
    @rule(back=st.integers(0, 2))
    def commit(self, back: int) -> None:
        number = max(self.round - 1 - back, self.committed)
        for store in self.stores:
            store.commit(number)
        self.committed = number

    @rule(back=st.integers(0, 3))
    def rollback(self, back: int) -> None:
        number = max(self.round - back, self.committed)
        for store in self.stores:
            store.rollback(number)
        self.model = {i: {n: v for n, v in versions.items() if n <= number} for i, versions in self.model.items()}
        self.round = number + 1

    @rule()
    def reopen(self) -> None:
        self.stores[1] = DiskStore(self.folder)

    @invariant()
    def loads_the_newest(self) -> None:
        for store in self.stores:
            for index in range(4):
                versions, state = self.model.get(index), store.load(index)
                if not versions:
                    assert state is None
                else:
                    want = versions[max(versions)]
                    assert state["x"].tolist() == [want, want] and float(state["n"]) == want

    @invariant()
    def keeps_no_more_than_it_needs(self) -> None:
        """On disk: per client the newest committed version and those after it."""
        files = {p.name for p in self.folder.iterdir()}
        for versions in self.model.values():
            old = sorted(n for n in versions if n <= self.committed)
            for number in old[:-1]:
                versions.pop(number)
        wanted = {f"client-{i}.round-{n}.safetensors" for i, versions in self.model.items() for n in versions}
        assert files == wanted


TestStores = Stores.TestCase
TestStores.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_a_torn_file_is_an_error_that_names_the_client(tmp_path: Path, damage) -> None:
    store = DiskStore(tmp_path)
    store.save(17, 3, {"x": torch.arange(5.0)})
    path = next(tmp_path.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"client 17 .*torn"):
        DiskStore(tmp_path).load(17)
    assert DiskStore(tmp_path).load(18) is None


def counting() -> fp.Algorithm:
    return fp.Algorithm(priors.Gaussian(), Counting(inference.Point(0.05, 1, 4)), weighting="examples", name="counting")


def participations(history: list[fp.Round], index: int) -> int:
    return sum(c.index == index and c.status == "ok" for r in history for c in r.clients)


@pytest.mark.parametrize("checkpoint_every", [1, 2, 5])
def test_personal_states_live_across_rounds_and_resumes(tmp_path: Path, checkpoint_every: int) -> None:
    """Memory, disk, and disk with a stop in between agree bit for bit; each client counted its own rounds."""
    clients, model = classification_clients((6, 5, 7, 4)), fp.models.softmax(4, 3)
    fields = {"cohort": 2, "checkpoint_every": checkpoint_every}
    memory = fp.run(counting(), model, clients, rounds=8, **fields)
    disk = fp.run(counting(), model, clients, rounds=8, out=tmp_path / "whole", **fields)
    fp.run(counting(), model, clients, rounds=3, out=tmp_path / "parts", **fields)
    parts = fp.run(counting(), model, clients, rounds=8, out=tmp_path / "parts", resume=True, **fields)
    for result in (disk, parts):
        assert equal(result.params, memory.params)
        assert without_seconds(result.history) == without_seconds(memory.history)
    for folder in ("whole", "parts"):
        store = DiskStore(tmp_path / folder / "clients")
        for client in clients:
            count, state = participations(memory.history, client.index), store.load(client.index)
            assert (0.0 if state is None else float(state["e_step/rounds"])) == count
        assert len(list((tmp_path / folder / "clients").iterdir())) <= len(clients)
    assert len({participations(memory.history, i) for i in range(4)}) > 1
