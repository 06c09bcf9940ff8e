"""Bad uploads in a run: dropped, recorded with name and reason, and the round goes on without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

import fedprior as fp
from cases import Lost, classification_clients, equal
from fedprior import Client, Examples, Stats, checkpoint, inference, posteriors, priors, server
from fedprior.codecs import Dense, PayloadError, Sparse
from wire import with_body, with_field

SIZES, VICTIM = (4, 9, 7, 5), 2
GAINS = inference.Gains(0.1)


@dataclass(frozen=True)
class Corrupting:
    """A codec whose payloads of one weight (weights are numbers of examples here) are damaged on their way."""

    codec: Dense | Sparse
    damage: Callable[[bytes], bytes]
    weight: float = float(SIZES[VICTIM])

    def encode(self, message, clients: float) -> bytes:
        payload = self.codec.encode(message, clients)
        return self.damage(payload) if clients == self.weight else payload

    def decode(self, payload: bytes, schema):
        return self.codec.decode(payload, schema)


DAMAGE = {
    "cut": (lambda p: p[:-3], "body of"),
    "flipped": (lambda p: p[:40] + bytes([p[40] ^ 4]) + p[41:], "checksum"),
    "empty": (lambda p: b"", "0 bytes"),
    "nan": (lambda p: with_body(p, p[32:-4] + b"\xff" * 4), "not finite"),
    "zero-count": (lambda p: with_field(p, 5, 0.0), "count of clients is 0"),
    "greedy-count": (lambda p: with_field(p, 5, 1e12), "count of clients is 1"),
    "nan-count": (lambda p: with_field(p, 5, float("nan")), "count of clients is nan"),
    "other-schema": (lambda p: with_field(p, 4, b"12345678"), "another schema"),
    "too-long": (lambda p: p * 3, "fit this schema"),
}


@pytest.mark.parametrize("codec", [Dense(), Sparse()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_one_corrupted_payload(codec, damage: Callable[[bytes], bytes], reason: str) -> None:
    clients, model = classification_clients(SIZES), fp.models.softmax(4, 3)

    def run(codec, clients) -> fp.Result:
        algorithm = fp.Algorithm(priors.Gaussian(), inference.Point(0.1, 1, 4), codec=codec, weighting="examples")
        return fp.run(algorithm, model, clients, rounds=2)

    result = run(Corrupting(codec, damage), clients)
    assert equal(result.params, run(codec, [c for c in clients if c.index != VICTIM]).params)
    for record in result.history:
        (lost,) = record.lost()
        assert (lost.index, lost.client, lost.status) == (VICTIM, f"client-{VICTIM}", "rejected")
        assert reason in lost.reason and f"client-{VICTIM}" in lost.reason
        assert lost.bytes_up == len(damage(b"x" * record.clients[0].bytes_up))  # what arrived is counted, used or not
        assert [c.status for c in record.clients].count("ok") == len(clients) - 1


def test_a_client_whose_training_diverged() -> None:
    """NaN in the data gives NaN parameters: that client is refused by name, the others are summed."""
    clients, model = classification_clients(SIZES), fp.models.mlp(4, (5,), 3)
    x = clients[1].train.x.clone()
    x[0, 0] = float("nan")
    sick = [*clients[:1], Client(1, "sick", Examples(x, clients[1].train.y)), *clients[2:]]
    algorithms = (
        fp.fedavg(0.1),
        fp.fedavg(0.1, value_type="int8"),
        fp.fedsparse(0.1, density=0.5),
        fp.feddropout(0.1),
        fp.topk(0.1),
    )
    for algorithm in algorithms:
        result = fp.run(algorithm, model, sick, rounds=1)
        assert [(c.client, c.status) for c in result.history[0].lost()] == [("sick", "rejected")]
        assert "not finite" in result.history[0].lost()[0].reason
        well = [c for c in clients if c.index != 1]
        assert equal(result.params, fp.run(algorithm, model, well, rounds=1).params)


@pytest.mark.parametrize("clients", [1.0, 3.0, 40.0])
def test_gains_are_bounded_for_each_client_that_an_upload_stands_for(clients: float) -> None:
    """Between 0 and 10^9 nats, which no E-step finds: one upload cannot decide on all gates for ever."""
    model = fp.models.mlp(4, (5,), 3)
    prior = priors.SharedGates(0.5, 1.0, 4, hold=0).bind(model, torch.zeros(1, 4))
    eta = prior.init({k: p.detach() for k, p in model.named_parameters()})

    def sent(gain: float) -> Stats:
        return Stats({"phi": eta.mean, "gain": {g: v + gain for g, v in eta.gain.items()}}).weighted(clients)

    for fine in (0.0, 1e9):
        assert prior.accept(eta, sent(fine)).clients == clients
    for bad in (-1e-9, 1.001e9):
        with pytest.raises(PayloadError, match="gains are nats between 0 and"):
            prior.accept(eta, sent(bad))


@pytest.mark.parametrize("make", [fp.fedavg, fp.fedadam, partial(fp.fedsparse, density=0.5), fp.topk])
def test_if_all_are_refused_eta_stays(make: Callable[..., fp.Algorithm]) -> None:
    clients, model = classification_clients(SIZES), fp.models.mlp(4, (5,), 3)
    result = fp.run(make(lr=1e30, epochs=4, batch_size=4), model, clients, rounds=2)
    assert all(c.status == "rejected" and "not finite" in c.reason for r in result.history for c in r.clients)
    first, _ = result.algorithm.start({k: p.detach() for k, p in model.named_parameters()})
    assert equal(result.eta.mean, first.mean)
    assert all(torch.isfinite(v).all() for v in result.params.values())
    assert result.bytes_up > 0


@dataclass(frozen=True)
class Huge:
    """An E-step whose answer is finite, and infinite once two of them are added."""

    def start(self, prior, eta) -> posteriors.Point:
        return posteriors.Point(prior.point(eta))

    def e_step(self, objective, prior, eta, client, state, rng):
        return posteriors.Point({k: torch.full_like(v, 3e38) for k, v in prior.point(eta).items()}), None


def test_a_sum_that_overflows_does_not_end_the_run() -> None:
    clients, model = classification_clients(SIZES), fp.models.softmax(4, 3)
    result = fp.run(fp.Algorithm(priors.Gaussian(), Huge()), model, clients, rounds=2)
    assert all(torch.isfinite(v).all() for v in result.params.values())
    assert all("not finite" in r.kept_eta for r in result.history)


@dataclass(frozen=True)
class HugeOnce:
    """FedSparse's E-step, all of whose weights are `value` in round 3."""

    value: float

    def start(self, prior, eta) -> posteriors.Gains:
        return GAINS.start(prior, eta)

    def e_step(self, objective, prior, eta, client, state, rng):
        q, state = GAINS.e_step(objective, prior, eta, client, state, rng)
        huge = {k: torch.full_like(v, self.value) for k, v in q.phi.items()}
        return replace(q, phi=huge) if float(eta.round["t"]) == 2 else q, state


@pytest.mark.parametrize(("step", "value"), [(server.Momentum(1.0, 0.5), 3e38), (server.Adam(), 1e25)], ids=str)
def test_a_round_whose_sum_overflows_is_one_from_which_nothing_arrived(step, value: float, tmp_path: Path) -> None:
    """In eta or in what the server keeps, which 1e25 squared would be: both go on from there, and the model shrinks."""
    clients, model = classification_clients(SIZES), fp.models.mlp(4, (9,), 3)
    prior = priors.SharedGates(0.4, 1.0, 2, hold=1)
    saved = []
    for name, fleet in (("huge", fp.Availability()), ("silent", Lost({(3, i) for i in range(len(clients))}))):
        algorithm = fp.Algorithm(prior, HugeOnce(value), step)
        result = fp.run(algorithm, model, clients, rounds=5, availability=fleet, out=tmp_path / name)
        assert [r.number for r in result.history if r.kept_eta] == [3]
        assert result.history[1].parameters_left > result.history[2].parameters_left
        saved.append(checkpoint.read(tmp_path / name))
    assert equal(saved[0].eta, saved[1].eta) and equal(saved[0].server, saved[1].server)


def test_an_error_in_a_client_names_round_client_and_seed() -> None:
    """Not a bad upload but a bug: it stops the run, and says where."""
    clients, model = classification_clients((4, 5)), fp.models.softmax(4, 3)
    broken = [clients[0], Client(1, "odd one", Examples(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)))]
    with pytest.raises(RuntimeError) as error:
        fp.run(fp.fedavg(), model, broken, rounds=1, seed=7)
    assert error.value.__notes__ == ["in round 1, client 'odd one' (index 1), seed 7"]
    empty = [clients[0], Client(1, "empty", Examples(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))]
    with pytest.raises(ValueError, match=r"client 'empty' has no training examples"):
        fp.run(fp.fedavg(), model, fp.data.LazyPopulation(2, empty.__getitem__), rounds=1)
