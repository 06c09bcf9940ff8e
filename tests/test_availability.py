"""Simulated fleets: who drops out, who is late, and that the others' round goes on."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest
import torch

import fedprior as fp
from cases import classification_clients, equal
from fedprior import Availability, cohort
from fedprior.codecs.frame import HEADER_BYTES


def within(count: int, trials: int, probability: float) -> bool:
    """A binomial count within 5 standard deviations of its mean."""
    return abs(count - trials * probability) < 5 * math.sqrt(trials * probability * (1 - probability)) + 1e-9


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.6])
def test_dropout_has_its_frequency(dropout: float) -> None:
    """Over rounds and over clients; independent of the number of examples and of the deadline."""
    fleet = Availability(dropout=dropout)
    status = [[fleet.status(0, n, i, 10 * i) for i in range(60)] for n in range(60)]
    lost = [[s == "dropped" for s in row] for row in status]
    assert {s for row in status for s in row} == ({"ok", "dropped"} if dropout else {"ok"})
    assert within(sum(map(sum, lost)), 3600, dropout)
    if dropout:
        pairs = sum(a and b for row, other in itertools.pairwise(lost) for a, b in zip(row, other, strict=True))
        assert within(pairs, 59 * 60, dropout**2)  # a client that dropped out is not likelier to do so again
    assert [[fleet.status(0, n, i, 1) for i in range(60)] for n in range(60)] == status


def test_lateness_is_of_the_device() -> None:
    """P(examples x seconds x exp(slowness g) > deadline), the same devices in every round."""
    fleet = Availability(deadline_seconds=1.0, seconds_per_example=0.01, slowness=0.8)
    for examples in (30, 100, 250):
        late = [fleet.status(0, 1, i, examples) == "late" for i in range(2000)]
        probability = 1 - NormalDist().cdf(math.log(1.0 / (examples * 0.01)) / 0.8)
        assert within(sum(late), 2000, probability)
        assert [fleet.status(0, 9, i, examples) == "late" for i in range(2000)] == late
        assert [fleet.status(1, 1, i, examples) == "late" for i in range(2000)] != late


def test_lateness_is_a_threshold_on_the_work() -> None:
    """Equal devices: late is who has more than deadline / seconds_per_example; any device has such a threshold."""
    equal_devices = Availability(deadline_seconds=1.0, seconds_per_example=0.01, slowness=0.0)
    assert [equal_devices.status(0, 1, 0, n) for n in (1, 100, 101, 10**6)] == ["ok", "ok", "late", "late"]
    fleet = Availability(deadline_seconds=1.0, seconds_per_example=0.01)
    thresholds = set()
    for index in range(50):
        late = [fleet.status(0, 1, index, n) == "late" for n in range(1, 1000)]
        assert late == sorted(late)
        thresholds.add(sum(not x for x in late))
    assert len(thresholds) > 25


def test_the_sample_is_uniform_without_replacement() -> None:
    seen = torch.zeros(12)
    for number in range(600):
        chosen = cohort.sample(0, number, 12, 5)
        assert len(set(chosen)) == 5 and chosen == sorted(chosen) and set(chosen) <= set(range(12))
        seen[chosen] += 1
    assert all(within(int(count), 600, 5 / 12) for count in seen)
    assert cohort.sample(0, 3, 12, 12) == list(range(12))
    assert cohort.sample(0, 1, 12, 5) == cohort.sample(0, 1, 12, 5)
    assert len({tuple(cohort.sample(s, 1, 12, 5)) for s in range(20)}) > 10


def test_a_round_is_the_round_of_those_who_answered() -> None:
    """Records say who was lost and why; eta is that of a population without them, bit for bit."""
    clients, model = classification_clients((4, 9, 30, 6, 5, 40, 7, 8)), fp.models.softmax(4, 3)
    fleet = Availability(dropout=0.3, deadline_seconds=1.0, seconds_per_example=0.05, slowness=0.2)
    result = fp.run(fp.fedavg(0.1), model, clients, rounds=1, availability=fleet, seed=1)
    (record,) = result.history
    status = {c.index: c.status for c in record.clients}
    assert status == {c.index: fleet.status(1, 1, c.index, len(c.train)) for c in clients}
    assert {"ok", "dropped", "late"} == set(status.values())
    answered = [c for c in clients if status[c.index] == "ok"]
    assert equal(result.params, fp.run(fp.fedavg(0.1), model, answered, rounds=1, seed=1).params)
    payload = HEADER_BYTES + 4 * 15
    assert all(c.bytes_down == payload for c in record.clients)  # it was sent to them all
    assert all(c.bytes_up == (payload if c.status == "ok" else 0) for c in record.clients)
    assert record.bytes_up == payload * len(answered) and record.bytes_down == payload * len(clients)
    assert [c.index for c in record.lost()] == [i for i, s in status.items() if s != "ok"]


def test_nobody_answers_and_the_run_goes_on() -> None:
    clients, model = classification_clients((4, 9)), fp.models.softmax(4, 3)
    fleet = Availability(deadline_seconds=1e-9)
    result = fp.run(fp.fedadam(0.1), model, clients, rounds=3, availability=fleet)
    assert equal(result.params, {k: p.detach() for k, p in model.named_parameters()})
    assert [len(r.lost()) for r in result.history] == [2, 2, 2] and result.bytes_up == 0


@pytest.mark.parametrize(
    "fields",
    [{"dropout": 1.0}, {"dropout": -0.1}, {"deadline_seconds": 0.0}, {"seconds_per_example": -1.0}, {"slowness": -1.0}],
)
def test_impossible_fleets_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Availability(**fields)
