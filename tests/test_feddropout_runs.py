"""Federated dropout in runs: drawn parts, resumed runs, hostile uploads, and what is learned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import classification_clients, equal, everywhere, image_clients, redraw, without_seconds
from fedprior import Availability, structure, tree
from fedprior.codecs import Sparse
from fedprior.objective import Objective
from fedprior.rng import generator
from stateful import Watched

CLIENTS = classification_clients((6, 9, 4, 7))
MODEL = fp.models.mlp(4, (6, 5), 3)


def watched(rounds: int, **fields) -> tuple[fp.Result, list]:
    """A run, and for every client that trained its index and which units it had."""
    algorithm = fp.feddropout(0.1, batch_size=4)
    algorithm = replace(algorithm, inference=Watched(algorithm.inference))
    fleet = Availability(dropout=0.2)
    given = {"engine": "sequential"} | fields  # workers would watch where nobody looks
    result = fp.run(algorithm, MODEL, CLIENTS, rounds=rounds, cohort=3, availability=fleet, **given)
    seen = [(i, *(tuple(z.tolist()) for z in eta.keep.values())) for i, eta in algorithm.inference.seen]
    return result, seen


def test_parts_differ_and_a_resumed_run_draws_the_same(tmp_path) -> None:
    whole, seen = watched(6)
    assert len(seen) > 10 and len({entry[1:] for entry in seen}) > 0.8 * len(seen)
    _, before = watched(3, out=tmp_path)
    resumed, after = watched(6, out=tmp_path, resume=True)
    assert before + after == seen and before and after
    assert equal(tree.flatten(resumed.eta), tree.flatten(whole.eta))
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert watched(6, seed=1)[1] != seen


class Backwards:
    """The clients in reverse, and only then the server."""

    def map_sum(self, work, indices):
        uploads = {index: work.client(index) for index in reversed(indices)}
        total = None
        for stats in (work.receive(uploads[index]) for index in indices):
            if stats is not None:
                total = stats if total is None else total + stats
        return total


def test_engines_agree() -> None:
    (a, _), (b, _) = watched(4), watched(4, engine=Backwards())
    assert equal(a.params, b.params) and without_seconds(a.history) == without_seconds(b.history)


@dataclass(frozen=True)
class Filling:
    """A client, known by its weight, that sends a number for everything it was not sent."""

    codec: Sparse
    weight: float
    number: float

    def encode(self, message, clients: float) -> bytes:
        if clients == self.weight:
            message = {k: torch.where(v == 0, self.number, v) for k, v in message.items()}
        return self.codec.encode(message, clients)

    def decode(self, payload: bytes, schema):
        return self.codec.decode(payload, schema)


@pytest.mark.parametrize("number", [1e6, 1e-30])
def test_values_for_units_that_were_not_sent_are_refused(number: float) -> None:
    algorithm = fp.feddropout(0.1, batch_size=4)
    victim = CLIENTS[2]
    hostile = replace(algorithm, codec=Filling(Sparse(), float(len(victim.train)), number))
    result = fp.run(hostile, MODEL, CLIENTS, rounds=3)
    others = [c for c in CLIENTS if c is not victim]
    assert equal(result.params, fp.run(algorithm, MODEL, others, rounds=3).params)
    for record in result.history:
        (lost,) = record.lost()
        assert (lost.client, lost.status) == (victim.name, "rejected") and lost.bytes_up > 0
        assert "not sent" in lost.reason and "phi" not in lost.reason and "1.weight" in lost.reason


def test_running_moments_of_units_that_nobody_held_stay() -> None:
    layers = [nn.Conv2d(1, 6, 5, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 5, bias=False)]
    model = redraw(
        nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    )
    result = fp.run(fp.feddropout(0.1, batch_size=8), model, image_clients(1), rounds=1)
    prior = result.algorithm.prior
    before = prior.init(Objective(model).params())
    part = prior.sample(before, generator(0, 1, 0, "downlink"))
    z = everywhere(structure.alive(prior.groups, part.keep, before.mean), before.mean)
    for name, mean in result.eta.mean.items():
        assert torch.equal(mean[z[name] == 0], before.mean[name][z[name] == 0])
        assert (mean[z[name] == 1] != before.mean[name][z[name] == 1]).double().mean() > 0.5, name
    assert int((z["1.running_mean"] == 0).sum()) == 3


def test_it_learns_the_digits_with_half_of_the_bytes() -> None:
    train, test = fp.data.load("digits")
    clients, model = fp.data.dirichlet(train, clients=10, alpha=1.0, seed=0), fp.models.mlp(64, (32,))
    result = fp.run(fp.feddropout(lr=0.2, epochs=3), model, clients, rounds=8, test=test)
    dense = fp.run(fp.fedavg(lr=0.2, epochs=3), model, clients, rounds=1)
    assert result.accuracy > 0.85
    assert result.history[0].bytes_up < 0.55 * dense.bytes_up and result.history[0].bytes_down < 0.55 * dense.bytes_down
