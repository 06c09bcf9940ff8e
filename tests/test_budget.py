"""Budgets of bytes: any run stops in time, and what is known of a round before it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import fedprior as fp
from budget_calls import MODELS, ROUNDS, VECTORS, run, total
from cases import equal
from fedprior import Availability, planning, wire
from fedprior.budget import Budget
from fedprior.codecs import Dense, Sparse
from fedprior.engines.sequential import summed
from fedprior.objective import Objective
from fedprior.records import ClientRecord, Round

BYTES = 3 * 2 * len(fp.fedavg().codec.encode(Objective(MODELS["mlp"][0]).params(), 0.0))  # a round of FedAvg


def limited(mb: float) -> fp.Algorithm:
    return replace(fp.fedavg(), budget=Budget(mb))


@pytest.mark.parametrize("fits", [1, 3, 5])
def test_a_run_stops_before_it_exceeds_its_budget(fits: int, tmp_path: Path) -> None:
    """Its last round is evaluated and saved whatever the other rounds are; going on changes nothing."""
    mb, test = (fits + 0.5) * BYTES / 1e6, VECTORS[0].train
    fields = {"test": test, "evaluate_every": 4, "checkpoint_every": 4, "out": tmp_path}
    result = run("mlp", limited(mb), 20, **fields)
    assert [r.number for r in result.history] == list(range(1, fits + 1))
    assert total(result) == fits * BYTES <= mb * 1e6
    assert [bool(r.metrics) for r in result.history] == [n % 4 == 0 or n == fits for n in range(1, fits + 1)]
    plain = run("mlp", fp.fedavg(), fits, test=test)
    assert f"of budget_mb={mb:g} spent, and one more round might exceed it" in result.summary()
    enough = run("mlp", limited(3 * mb), fits, test=test).summary()
    assert f"{total(result) / 1e6:.4g} of budget_mb={3 * mb:g} spent" in enough and "exceed" not in enough
    assert "budget" not in plain.summary()
    assert equal(plain.params, result.params) and plain.history[-1].metrics == result.history[-1].metrics
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    more: list[Round] = []
    again = run("mlp", limited(mb), 20, resume=True, on_round=more.append, **fields)
    assert not more and again.history == result.history and equal(again.params, result.params)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    with pytest.raises(ValueError, match="its algorithm was"):
        run("mlp", limited(2 * mb), 20, resume=True, **fields)


@pytest.mark.parametrize("algorithm", [fp.fedavg(), fp.feddropout(), fp.fedsparse(density=0.5), fp.topk()], ids=str)
def test_less_than_one_round_is_refused(algorithm: fp.Algorithm) -> None:
    with pytest.raises(ValueError, match="too small for one round of 3 clients: one needs") as error:
        run("mlp", replace(algorithm, budget=Budget(1e-4)), 20)
    enough = float(str(error.value).split(" needs ")[1].split(" MB")[0])
    result = run("mlp", replace(algorithm, budget=Budget(1.1 * enough)), 20)
    assert len(result.history) == 1 and total(result) <= 1.1 * enough * 1e6


def round_of(number: int, *clients: tuple[int, int]) -> Round:
    """A round whose clients received and sent so many bytes."""
    records = tuple(ClientRecord(i, "", "ok", 1, down, up, 0.0) for i, (down, up) in enumerate(clients))
    down, up = (sum(side) for side in zip(*clients, strict=True))
    return Round(number, down, up, 0, 0.0, 0.0, clients=records)


@dataclass(frozen=True)
class Spent:
    """Rounds, what is known of the next, and the bytes that it may need, by hand: 1.05 x 2 clients x the longest."""

    history: list[Round]
    bytes: float
    down: float | None = None
    up: float | None = None


SPENT = [
    Spent([], 0),
    Spent([round_of(1, (100, 50), (100, 60))], 310 + 2.1 * 160),
    Spent([round_of(1, (100, 50), (100, 0))], 250 + 2.1 * 150),  # one was dropped: it may answer next time
    Spent([round_of(1, (100, 50), (80, 60)), round_of(2, (90, 0), (90, 0))], 290 + 180 + 2.1 * 150),
    Spent([round_of(1, (300, 50), (300, 60)), round_of(2, (40, 20), (40, 10))], 710 + 110 + 2.1 * 60),
    Spent([], 0, 100, 50),
    Spent([round_of(1, (100, 50), (100, 60))], 310 + 2 * 90 + 2.1 * 60, 90),
    Spent([round_of(1, (100, 50), (100, 60))], 310 + 2 * 130 + 2.1 * 60, 130),
    Spent([round_of(1, (100, 50), (100, 60))], 310 + 2.1 * 100 + 2 * 62, None, 62),
    Spent([round_of(1, (100, 50), (100, 60))], 310 + 2 * 90 + 2 * 64, 90, 64),  # other clients may send all of the 64
    Spent([round_of(1, (100, 0), (100, 0))], 200 + 2 * 90 + 2 * 64, 90, 64),
]


@pytest.mark.parametrize("case", SPENT, ids=lambda c: f"{c.bytes:g}")
def test_when_it_is_spent(case: Spent) -> None:
    assert not Budget((case.bytes + 0.01) / 1e6).spent(case.history, 2, case.down, case.up)
    if case.history:
        assert Budget((case.bytes - 0.01) / 1e6).spent(case.history, 2, case.down, case.up)


@dataclass
class Watching:
    """An engine that asks what is known of each round, and keeps it beside what the round was."""

    seen: list[tuple[int | None, int | None, list[ClientRecord]]]

    def map_sum(self, work, indices):
        down, up = planning.known(work.algorithm, work.like)
        total = summed(work, map(work.client, indices))
        self.seen.append((down, up, list(work.records)))
        return total


KNOWN = [
    (fp.fedavg(), "exact"),
    (fp.fedavg(value_type="int4"), "exact"),
    (fp.fedavg(value_type="int8", entropy="zlib"), "bound"),
    (fp.fedsparse(0.1, density=0.2, batch_size=8), "late"),
    (fp.fedsparse(0.1, density=0.2, batch_size=8, value_type="bfloat16", entropy="none"), "late"),
    (fp.fedsparse(0.1, density=0.2, batch_size=8, value_type="int8", entropy="none"), "late"),
    (fp.fedsparse(0.1, density=0.2, batch_size=8, value_type="int8"), "bound"),
    (fp.topk(), "bound"),
    (fp.topk(fraction=0.01, entropy="none"), "bound"),
    (fp.topk(fraction=0.3, value_type="int8", entropy="none"), "bound"),
    (fp.topk(fraction=0.2, value_type="int2"), "bound"),
    (fp.topk(fraction=0.5, entropy="none"), "exact"),
    (fp.grouplasso(), "exact"),
    (replace(fp.grouplasso(strength=0.01), codec=Sparse("bfloat16", "zlib")), "bound"),
    (fp.feddropout(), "exact"),
    (replace(fp.feddropout(rate=0.3), codec=Sparse("int8", "zlib"), downlink=Sparse(), delta=True), "bound"),
    (replace(fp.feddropout(), codec=Dense()), "exact"),
    (fp.fedsparse(lambda_0=0.1), "nothing"),
]


@pytest.mark.parametrize(("algorithm", "kind"), KNOWN, ids=lambda v: v if isinstance(v, str) else str(v)[:60])
def test_what_is_known_of_a_round_before_it_begins(algorithm: fp.Algorithm, kind: str) -> None:
    """Broadcasts to the byte; uploads to the byte if nothing is dropped or coded, else a bound that none exceeds.

    "late": to the byte from round 6 on, when the density is reached. Before, units that are of no use yet have gains of
    zero, which are not sent.
    """
    watching = Watching([])
    run("lenet", algorithm, engine=watching)
    assert len(watching.seen) == ROUNDS
    for number, (down, up, records) in enumerate(watching.seen, 1):
        exact = kind == "exact" or (kind == "late" and number > 5)
        assert (down is None) == algorithm.samples and (up is None) == (kind == "nothing")
        assert down is None or {c.bytes_down for c in records} == {down}
        longest = max(c.bytes_up for c in records)
        assert up is None or (longest == up if exact else 0.75 * up < longest <= up)


PARTS = {
    **{name: (model, clients[0].train.x[:1]) for name, (model, clients) in MODELS.items()},
    "resnet": (fp.models.resnet(8, "batch", 4, classes=3), torch.zeros(1, 1, 8, 8)),
    "vit": (fp.models.vit(8, 4, 12, 3, 2, 20, 3), torch.zeros(1, 1, 8, 8)),
}


@pytest.mark.parametrize("name", PARTS)
def test_the_parts_that_dropout_draws_are_equally_long(name: str) -> None:
    """So that what is known of one is known of all."""
    model, x = PARTS[name]
    made = fp.feddropout(rate=0.6).bind(model, x)
    eta, lengths = made.prior.init(Objective(model).params()), set()
    for seed in range(20):
        sent = made.sample(eta, torch.Generator().manual_seed(seed))
        lengths.add(len(made.codec.encode(wire.flat(made.message(sent, made.prior.full(sent))), 1.0)))
    assert lengths == {planning.known(made, eta)[1]}


@pytest.mark.parametrize("fits", [1, 2, 4])
def test_a_budget_of_so_many_rounds_pays_for_them_to_the_byte(fits: int) -> None:
    for less, wanted in ((0, fits), (1, fits - 1)):
        if wanted:
            assert len(run("mlp", limited((fits * BYTES - less) / 1e6), 20).history) == wanted


@pytest.mark.parametrize("algorithm", [fp.fedavg(), fp.feddropout(), fp.fedsparse(density=0.2)], ids=lambda a: a.name)
def test_clients_that_do_not_answer_do_not_fool_it(algorithm: fp.Algorithm) -> None:
    mb = 4.5 * BYTES / 1e6
    used = []
    for seed in range(4):
        fleet = Availability(dropout=0.7)
        result = run("mlp", replace(algorithm, budget=Budget(mb)), 60, availability=fleet, seed=seed)
        used.append(total(result) / 1e6)
        assert len(result.history) < 60
    assert max(used) <= mb and min(used) > 0.7 * mb


@pytest.mark.parametrize("seed", range(6))
def test_a_client_whose_messages_compress_less_does_not_exceed_it(seed: int) -> None:
    """Six clients whose inputs are zeros, and two with noise, whose messages are half as long again; one a round."""
    rng = torch.Generator().manual_seed(0)
    clients = []
    for i in range(8):
        x, y = torch.randn(40, 20, generator=rng) * (i >= 6), torch.randint(3, (40,), generator=rng)
        clients.append(fp.Client(i, f"client-{i}", fp.Examples(x, y)))
    algorithm = replace(fp.fedavg(value_type="int8", entropy="zlib"), budget=Budget(0.05))
    result = fp.run(algorithm, fp.models.mlp(20, (60,), 3), clients, rounds=40, cohort=1, seed=seed, progress=False)
    assert 0.8 * 0.05e6 < total(result) <= 0.05e6 and len(result.history) < 40
