"""Secure sums in whole runs: clients that drop out at every stage, by a plain loop over those whose vectors arrived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import fedprior as fp
from cases import classification_clients, close, equal, without_seconds
from fedprior import Client, engines, tree
from fedprior.core import Params
from fedprior.privacy import Privacy, SecureSum, secure, shamir
from fedprior.privacy.masks import KEYS_BYTES
from fedprior.privacy.parties import Simulated

CLIENTS = classification_clients((8, 9, 14, 7, 6, 11, 20, 5, 9))
MODEL = fp.models.mlp(4, (6,), 3)
pytestmark = pytest.mark.filterwarnings("ignore::fedprior.privacy.NoiseWarning")  # nine clients alone
PLAIN = fp.fedavg(0.1, weighting="uniform")
SECURE = replace(PLAIN, secure=SecureSum())
BEFORE = ("keys", "shares", "masked")
LEAST = 6  # of 9 clients: two thirds
WORDS = sum(p.numel() for p in MODEL.parameters()) + 2  # with the weight and `within`


def scripted(monkeypatch: pytest.MonkeyPatch, stages: Mapping[int, str]) -> None:
    """Who stops where, in every round; who stops before its upload is dropped for the rest of the run as well."""
    monkeypatch.setattr(fp.Availability, "stage", lambda self, seed, number, index, status: stages.get(index, ""))
    monkeypatch.setattr(
        fp.Availability,
        "status",
        lambda self, seed, number, index, examples: "dropped" if stages.get(index, "") in BEFORE else "ok",
    )


def go(algorithm: fp.Algorithm, rounds: int = 1, clients: Any = CLIENTS, **fields: Any) -> fp.Result:
    chosen: dict[str, Any] = {"engine": engines.Sequential()} | fields
    return fp.run(algorithm, MODEL, clients, rounds=rounds, **chosen)


def start() -> Params:
    return {k: v.detach() for k, v in MODEL.named_parameters()}


def mean_of(clients: list[Client], seed: int = 0) -> Params:
    """Of what each of the clients learns alone, in round one: its randomness is its own."""
    learned = [go(PLAIN, clients=[c], seed=seed).params for c in clients]
    return {k: torch.stack([params[k] for params in learned]).mean(0) for k in learned[0]}


SCRIPTS: dict[str, dict[int, str]] = {
    **{f"one at {stage}": {4: stage} for stage in (*BEFORE, "reveal")},
    **{f"a third at {stage}": {1: stage, 4: stage, 8: stage} for stage in (*BEFORE, "reveal")},
    "each at another": {0: "keys", 3: "shares", 8: "masked"},
    "two before and one after": {0: "keys", 3: "masked", 8: "reveal"},
}


@pytest.mark.parametrize("engine", [engines.Sequential(), engines.Workers(2)], ids=["loop", "workers"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_whoever_stops_the_model_is_the_mean_of_the_vectors_that_arrived(
    script: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = SCRIPTS[script]
    scripted(monkeypatch, stages)
    result = go(SECURE, engine=engine)
    (record,) = result.history
    arrived = [c for c in CLIENTS if stages.get(c.index, "") not in BEFORE]
    assert record.kept_eta == "" and [c.index for c in record.clients if c.status == "ok"] == [c.index for c in arrived]
    monkeypatch.undo()
    assert close(result.params, mean_of(arrived), 1e-5)
    reasons = {c.index: c.reason for c in record.clients if c.reason}
    assert reasons == {i: f"it sent no {stage}" for i, stage in stages.items() if stage in BEFORE[:2]}


@pytest.mark.parametrize("stage", [*BEFORE, "reveal"])
def test_with_fewer_than_two_thirds_the_round_changes_nothing(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run goes on: the next round is another one."""
    scripted(monkeypatch, dict.fromkeys(range(4), stage))
    result = go(SECURE, rounds=2)
    assert [f"{LEAST} are needed to unmask" in r.kept_eta for r in result.history] == [True, True]
    assert equal(result.params, start())
    told = [c for r in result.history for c in r.clients]
    if stage in BEFORE[:2]:  # nobody trained for nothing
        assert all(c.status == "dropped" and c.seconds == 0.0 for c in told)
        assert any("5 of 9 clients are left, and 6 are needed" in c.reason for c in told)
        heard = 0 if stage == "keys" else 9 * (4 + KEYS_BYTES)  # nobody is told the keys of too few
        assert {c.bytes_down for c in told} == {heard}


def test_two_of_three_are_enough_to_unmask_and_too_few_to_hide_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of two tells each of them the other's vector: the round ends before they train."""
    for stage, ended in (("keys", True), ("shares", True), ("masked", False)):
        scripted(monkeypatch, {1: stage})
        (record,) = go(SECURE, clients=CLIENTS[:3]).history
        assert bool(record.kept_eta) == ended, stage
        assert {c.status for c in record.clients} == ({"dropped"} if ended else {"ok", "dropped"})


def test_bytes_are_those_of_the_messages_that_were_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {0: "keys", 3: "shares", 8: "reveal"}
    scripted(monkeypatch, stages)
    clients = {c.index: c for c in go(SECURE).history[0].clients}
    index, sealed = 4, 2 * shamir.SHARE_BYTES + 16
    roster, shares, box = 8 * (index + KEYS_BYTES), 7 * (index + sealed), 6 * (index + sealed)
    vector, request, answer = 16 + 4 * WORDS, 8 + 7 * index, 7 * shamir.SHARE_BYTES
    assert (clients[0].bytes_up, clients[0].bytes_down) == (0, 0)
    assert (clients[3].bytes_up, clients[3].bytes_down) == (KEYS_BYTES, roster)
    assert clients[8].bytes_up == KEYS_BYTES + shares + vector
    assert clients[1].bytes_up == KEYS_BYTES + shares + vector + answer
    eta = go(PLAIN).history[0].clients[1].bytes_down
    assert clients[1].bytes_down == clients[8].bytes_down == roster + box + eta + request


def test_each_client_of_each_round_of_each_run_has_secrets_and_noise_of_its_own() -> None:
    """Or the masks of two rounds would cancel, and their noise as well."""
    played = [Simulated(seed, number, dict.fromkeys(range(3), "")) for seed in (0, 1) for number in (1, 2)]
    assert len({secure.advertise(parties.state(i)) for parties in played for i in range(3)}) == 12
    assert len({parties.noise(i).bytes(16) for parties in played for i in range(3)}) == 12
    for parties in played:  # a process that only masks derives the same again
        assert [parties.public().state(i).secret for i in range(3)] == [parties.state(i).secret for i in range(3)]


def test_the_least_that_must_stay_are_told_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of nine: each has a roster of six, the shares of five, and a request about six."""
    scripted(monkeypatch, {0: "keys", 4: "keys", 8: "keys"})
    clients = {c.index: c for c in go(SECURE).history[0].clients}
    index, sealed, eta = 4, 2 * shamir.SHARE_BYTES + 16, go(PLAIN).history[0].clients[1].bytes_down
    roster, box, request = LEAST * (index + KEYS_BYTES), (LEAST - 1) * (index + sealed), 8 + LEAST * index
    assert clients[1].bytes_down == roster + box + eta + request


def test_a_fleet_that_drops_out_stops_at_all_stages() -> None:
    """With probability p before the upload, each stage as likely, and p / 3 after it."""
    fleet, count = fp.Availability(dropout=0.3), 6000
    seen: Counter[str] = Counter()
    for index in range(count):
        status = fleet.status(0, 1, index, 10)
        stage = fleet.stage(0, 1, index, status)
        assert (status == "dropped") == (stage in BEFORE)
        seen[stage] += 1
    for stage, share in {"keys": 0.1, "shares": 0.1, "masked": 0.1, "reveal": 0.07, "": 0.63}.items():
        assert seen[stage] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)
    assert fp.Availability().stage(0, 1, 0, "ok") == "" and fp.Availability().stage(0, 1, 0, "late") == ""


@pytest.mark.parametrize("private", [None, Privacy(noise_multiplier=0.5, delta=0.01)], ids=["sum", "private sum"])
def test_a_run_under_drop_outs_is_the_same_on_every_engine(private: Any) -> None:
    """Rounds that come to an update and rounds that do not, in one run."""
    algorithm = replace(SECURE, privacy=private)
    fields: dict[str, Any] = {"rounds": 8, "availability": fp.Availability(dropout=0.25), "seed": 1}
    one, many = go(algorithm, **fields), go(algorithm, engine=engines.Workers(2), **fields)
    assert equal(one.params, many.params)
    assert without_seconds(one.history) == without_seconds(many.history)
    assert 0 < sum(bool(r.kept_eta) for r in one.history) < 8
    for r in one.history:
        answered = sum(c.status == "ok" for c in r.clients)
        assert not r.kept_eta or answered < LEAST or "clients answered, and" in r.kept_eta


def test_noise_is_the_whole_of_it_while_two_thirds_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the six that must stay adds a sixth of the variance: three that are gone leave (z C)^2."""
    scripted(monkeypatch, {0: "keys", 3: "shares", 8: "masked"})
    still = replace(fp.fedavg(1e-12, weighting="uniform"), secure=SecureSum())
    model = fp.models.mlp(4, (60,), 3)
    private = replace(still, privacy=Privacy(noise_multiplier=0.8, delta=0.01))
    result = fp.run(private, model, CLIENTS, rounds=1, engine=engines.Sequential())
    moved = tree.map(lambda a, b: a - b.detach(), result.params, dict(model.named_parameters()))
    noise = torch.cat([v.flatten() for v in moved.values()]).double()
    assert float(noise.std()) == pytest.approx(0.8 / 9, rel=4 / (2 * len(noise)) ** 0.5)
