"""Laws of partitions: each is a true partition, lazy, seeded, and skewed as documented."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprior import data
from fedprior.core import Client, Examples, Population

Split = Callable[..., data.Partition]


@dataclass(frozen=True)
class Scheme:
    """One row of the table: a partition of `examples` into `clients`, seeded, with a holdout."""

    name: str
    split: Split
    keeps_seedless: bool = False  # the seed moves the held-out examples only


def _by_key(examples: Examples, clients: int, seed: int = 0, holdout: float = 0.0):
    return data.by_key(examples, [i % clients for i in range(len(examples))], seed, holdout)


SCHEMES = [
    Scheme("iid", data.iid),
    Scheme("dirichlet", lambda e, c, **kw: data.dirichlet(e, c, alpha=0.5, min_examples=0, **kw)),
    Scheme("dirichlet, min 1", lambda e, c, **kw: data.dirichlet(e, c, alpha=5.0, **kw)),
    Scheme("shards", lambda e, c, **kw: data.shards(e, c, shards_per_client=2, **kw)),
    Scheme("by_key", _by_key, keeps_seedless=True),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)


def numbered(count: int, classes: int = 10) -> Examples:
    """Examples whose x is their own position, so that a client shows which ones it has."""
    return Examples(torch.arange(count).float().unsqueeze(1), torch.arange(count) * 7 % classes)


def positions(examples: Examples | None) -> list[int]:
    return [] if examples is None else [int(v) for v in examples.x[:, 0]]


def dealt(population: Population) -> list[list[int]]:
    return [positions(c.train) + positions(c.held_out) for c in population]


@every_scheme
@pytest.mark.parametrize("holdout", [0.0, 0.25, 0.9])
def test_every_example_goes_to_exactly_one_client(scheme, holdout):
    examples = numbered(503)
    population = scheme.split(examples, 13, seed=3, holdout=holdout)
    assert isinstance(population, Population) and len(population) == 13
    assert sorted(i for mine in dealt(population) for i in mine) == list(range(503))
    for client in population:
        for part in (client.train, client.held_out):
            if part is not None:
                assert torch.equal(part.y, examples.y[torch.tensor(positions(part)).long()])


@every_scheme
@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(60, 300),
    clients=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    holdout=st.floats(0, 0.99),
)
def test_sizes_agree_with_the_clients(scheme, count, clients, seed, holdout):
    population = scheme.split(numbered(count, classes=3), clients, seed=seed, holdout=holdout)
    assert sorted(i for mine in dealt(population) for i in mine) == list(range(count))
    for i, client in enumerate(population):
        held = 0 if client.held_out is None else len(client.held_out)
        total = len(client.train) + held
        assert (client.index, client.name) == (i, population.name(i))
        assert population.size(i) == len(client.train)
        assert held == min(round(holdout * total), max(total - 1, 0))
        assert torch.equal(population.label_counts()[i].sum(), torch.tensor(total))


@every_scheme
def test_the_seed_decides(scheme):
    examples = numbered(400)
    first, again, other = (scheme.split(examples, 8, seed=s, holdout=0.3) for s in (5, 5, 6))
    assert torch.equal(first.index, again.index) and torch.equal(first.offsets, again.offsets)
    trained = [[set(positions(c.train)) for c in p] for p in (first, other)]
    assert trained[0] != trained[1]
    owners = [[set(mine) for mine in dealt(p)] for p in (first, other)]
    assert (owners[0] == owners[1]) is scheme.keeps_seedless


@every_scheme
def test_holdout_does_not_move_examples_between_clients(scheme):
    examples = numbered(400)
    without, with_holdout = (scheme.split(examples, 8, seed=5, holdout=h) for h in (0.0, 0.4))
    assert all(c.held_out is None for c in without)
    assert [set(m) for m in dealt(without)] == [set(m) for m in dealt(with_holdout)]


@every_scheme
def test_the_global_generators_are_left_alone(scheme):
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    scheme.split(numbered(100), 5, seed=1, holdout=0.5)[0]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == pickle.dumps(np.random.get_state())  # noqa: NPY002


@every_scheme
def test_a_population_indexes_like_a_list(scheme):
    population = scheme.split(numbered(100), 5)
    assert population[-1].index == 4 and population[np.int64(2)].index == 2
    assert [c.index for c in population] == list(range(5))
    for beyond in (5, -6):
        with pytest.raises(IndexError, match=f"client {beyond} of a population of 5"):
            population[beyond]
    with pytest.raises(TypeError):
        population[1:2]


@every_scheme
def test_a_population_survives_pickling(scheme):
    population = scheme.split(numbered(100), 5)
    assert dealt(pickle.loads(pickle.dumps(population))) == dealt(population)


def test_a_client_with_one_example_trains_on_it():
    assert all(len(c.train) == 1 and c.held_out is None for c in data.iid(numbered(4), 4, 0, 0.9))


@every_scheme
def test_a_hundred_thousand_clients_cost_their_index_only(scheme):
    if scheme.name == "dirichlet, min 1":
        pytest.skip("with two examples a client some are always empty")
    count, clients = 200_000, 100_000
    examples = numbered(count)
    tracemalloc.start()
    population = scheme.split(examples, clients)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    names = 0 if population.names is None else clients * 100  # 50 for each str, 8 for its place
    index = population.index.nbytes + population.offsets.nbytes
    assert index == 8 * count + 8 * (clients + 1)
    assert kept <= index + names + 200_000
    assert isinstance(population[99_999], Client)


def test_by_key_makes_one_client_of_each_key():
    keys = ["b/two", "a", "c", "a", "b/two", "a"]
    examples = Examples(torch.arange(6.0).unsqueeze(1), torch.zeros(6), keys)
    population = data.by_key(examples)
    assert [c.name for c in population] == sorted(set(keys))
    for client in population:
        assert sorted(positions(client.train)) == [i for i, key in enumerate(keys) if key == client.name]
    other = data.by_key(examples, keys=[1, 1, 1, 2, 2, 2])
    assert [(c.name, len(c.train)) for c in other] == [("1", 3), ("2", 3)]


def test_paired_joins_clients_by_name():
    train = data.by_key(numbered(6), ["a", "b", "c"] * 2)
    test = data.by_key(numbered(4), ["c", "b", "a", "extra"])
    both = data.paired(train, test)
    assert [(c.index, c.name, positions(c.held_out)) for c in both] == [
        (0, "a", [2]),
        (1, "b", [1]),
        (2, "c", [0]),
    ]
    assert [sorted(positions(c.train)) for c in both] == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="1 clients have no test examples, the first is 'extra'"):
        data.paired(test, train)


def test_a_lazy_population_makes_clients_when_asked():
    made = []

    def make(i: int) -> Client:
        made.append(i)
        return Client(i, f"station {i}", numbered(i + 1))

    population = data.LazyPopulation(10**9, make)
    assert isinstance(population, Population)
    assert len(population) == 10**9 and made == []
    assert len(population[2].train) == 3 and population[-1 - 10**9 + 10].name == "station 9"
    assert made == [2, 9]
    with pytest.raises(IndexError, match="of a population of 1000000000"):
        population[10**9]


FEW = numbered(20)
REAL = Examples(torch.zeros(20, 1), torch.zeros(20))
MATRIX = Examples(torch.zeros(20, 1), torch.zeros(20, 2, dtype=torch.long))

ERRORS = [
    (lambda: data.iid(FEW, 21), "21 clients need 21 examples, and there are 20"),
    (lambda: data.iid(FEW, 0), "at least 1 client, got clients=0"),
    (lambda: data.iid(FEW, 2, seed=-1), "seed is a whole number from 0 up, got -1"),
    (lambda: data.iid(FEW, 2, holdout=1.0), r"in \[0, 1\); got 1.0"),
    (lambda: data.iid(FEW, 2, holdout=-0.1), r"in \[0, 1\); got -0.1"),
    (lambda: data.iid(FEW, 2, holdout=float("nan")), r"in \[0, 1\); got nan"),
    (lambda: data.dirichlet(FEW, 5, alpha=0.0), r"alpha must be in \(0, 1e9\], got 0.0"),
    (lambda: data.dirichlet(FEW, 5, alpha=float("nan")), "alpha must be in"),
    (lambda: data.dirichlet(FEW, 5, alpha=1, min_examples=5), "5 clients need 25 examples"),
    (lambda: data.dirichlet(FEW, 10, alpha=0.01, min_examples=2), "no draw of 1000 at alpha=0.01"),
    (lambda: data.dirichlet(REAL, 5, alpha=1.0), "dirichlet needs one integer label per example"),
    (lambda: data.dirichlet(MATRIX, 5, alpha=1.0), r"torch.int64 and shape \(20, 2\)"),
    (lambda: data.shards(REAL, 5), "shards needs one integer label per example"),
    (lambda: data.shards(FEW, 5, shards_per_client=0), "shards_per_client must be at least 1"),
    (lambda: data.shards(FEW, 11, 2), "11 clients need 22 examples"),
    (lambda: data.by_key(FEW), r"no keys: give by_key\(keys="),
    (lambda: data.by_key(FEW, ["a"]), "20 examples and 1 keys"),
    (lambda: data.by_key(FEW, "a" * 20), r"got the text 'a+'; a column's name goes to from_csv\(client="),
    (lambda: data.by_key(FEW, [None] * 20), "20 of 20 keys are missing"),
    (
        lambda: data.LazyPopulation(0, lambda i: Client(i, "a", FEW)),
        "at least 1 client, got count=0",
    ),
    (lambda: data.LazyPopulation(2, lambda i: Client(0, "a", FEW))[1], "client with index 0"),
]


@pytest.mark.parametrize(("request_", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_an_impossible_request_says_so(request_, message):
    with pytest.raises(ValueError, match=message):
        request_()


def test_make_must_return_a_client():
    with pytest.raises(TypeError, match=r"make\(1\) must return a fedprior Client, got NoneType"):
        data.LazyPopulation(2, lambda i: None)[1]  # pyright: ignore[reportArgumentType]


@every_scheme
@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_gathered_clients_are_those_of_the_index(scheme, holdout):
    """Training examples alone, in the order asked for; a negative index is the client's own."""
    population = scheme.split(numbered(103), 7, seed=3, holdout=holdout)
    asked = [4, -1, 0]
    got, want = population.gather(asked), [population[i] for i in asked]
    assert (got.indices, got.names) == ([c.index for c in want], [c.name for c in want])
    assert got.sizes == [len(c.train) for c in want]
    for where, client in zip(got.where.split(list(got.sizes)), want, strict=True):
        assert positions(got.examples.take(where)) == positions(client.train)
