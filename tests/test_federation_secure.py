"""Secure aggregation on a federation: the simulation's bits, whoever stays away, and masked vectors alone."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedprior as fp
from cases import Lost, classification_clients, equal, hidden, lost_of, without_seconds
from fedprior import tree
from fedprior.privacy import SecureSum, masks, secure
from fedprior.privacy.layout import Layout

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from flwr.app import Message  # pyright: ignore[reportMissingImports]

from fedprior.federation import Settings, bundle, client_app, secure_node, serve
from fedprior_node import mail
from grid import MODEL, NODES, TEST, LocalGrid

CLIENTS = classification_clients((6, 5, 9, 4, 7, 8, 3, 6, 5))
LEAST = masks.threshold_for(len(CLIENTS))  # 6 of 9
SECURE = replace(fp.fedavg(0.1, weighting="uniform"), secure=SecureSum())
ALGORITHMS = [
    SECURE,
    replace(fp.fedavg(0.1, weighting="examples"), secure=SecureSum(most=8.0), name="examples"),
    replace(SECURE, secure=SecureSum(bits=64), name="64-bits"),
    replace(fp.fedadam(0.1), weighting="uniform", secure=SecureSum()),
    replace(fp.fedper(0.1), weighting="uniform", secure=SecureSum()),
    replace(
        fp.fedsparse(0.1, density=0.3),
        weighting="uniform",
        secure=SecureSum(bound={"phi": 4.0, "gain": 1e4, "clients": 1.0}),
    ),
]
ROUNDS = 3


def own(partition: int, partitions: int) -> list[fp.Client]:
    return CLIENTS[partition::partitions]


def federated(algorithm: fp.Algorithm, folder: Path, change: Any = None, **fields: Any) -> fp.Result:
    grid = LocalGrid(client_app(algorithm, own, MODEL, state=folder / "states"), NODES, *([change] if change else []))
    fields = {"rounds": ROUNDS, "clients": len(CLIENTS), "nodes": NODES, "seconds": 0.3} | fields
    return serve(grid, algorithm, MODEL, Settings(out=str(folder / "out"), **fields), 7, TEST)


def simulated(algorithm: fp.Algorithm, lost: Collection[tuple[int, int]] = (), **fields: Any) -> fp.Result:
    fields = {"rounds": ROUNDS, "test": TEST, "engine": fp.engines.Sequential(1), "availability": Lost(lost)} | fields
    return fp.run(algorithm, MODEL, CLIENTS, **fields)


def request_of(message: Message) -> dict[str, Any]:
    return bundle.unpack(mail.blob(message), 1 << 20)[0]


def losing(gone: Mapping[str, Collection[int]], only: Collection[int] = range(99)) -> Any:
    """Clients whose entries of a stage do not arrive."""

    def change(number: int, request: Message, reply: Message) -> Message | None:
        asked = request_of(request)
        if asked["ask"] not in gone or asked["number"] not in only:
            return reply
        header, parts = bundle.unpack(mail.blob(reply), 1 << 20)
        kept = [entry["client"] not in gone[asked["ask"]] for entry in header["clients"]]
        header["clients"] = list(itertools.compress(header["clients"], kept))
        return mail.reply(request, bundle.pack(header, list(itertools.compress(parts, kept))))

    return change


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_the_model_the_bytes_and_the_records_are_those_of_the_simulation(
    algorithm: fp.Algorithm, tmp_path: Path
) -> None:
    got, want = federated(algorithm, tmp_path), simulated(algorithm)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert without_seconds(got.history) == hidden(want.history)
    assert not any(r.kept_eta or r.lost() for r in got.history)
    assert {(c.examples, c.seconds) for r in got.history for c in r.clients} == {(0, 0.0)}


def test_a_cohort_of_some(tmp_path: Path) -> None:
    got, want = federated(SECURE, tmp_path, cohort=5), simulated(SECURE, cohort=5)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert without_seconds(got.history) == hidden(want.history)


GONE = [{stage: (1, 5, 8)} for stage in secure_node.STAGES]
GONE += [{stage: (0, 3, 6)} for stage in secure_node.STAGES]  # all of one node
GONE += [{"keys": (0,), "masked": (8,), "reveal": (1,)}, {"shares": (4,), "masked": (0,), "reveal": (1,)}]


@pytest.mark.parametrize("gone", GONE, ids=str)
def test_a_third_may_stay_away_at_any_stage(gone: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    """The sum is that of the clients whose vectors arrived: a simulation without the others has the same bits."""
    lose, revealing = losing(gone, [2]), set()

    def change(number: int, request: Message, reply: Message) -> Message | None:
        asked = {"clients": [], **request_of(request)}
        revealing.update((asked["number"], i) for i, _ in asked["clients"] if asked["ask"] == "reveal")
        return lose(number, request, reply)

    got = federated(SECURE, tmp_path, change)
    lost = {i for stage, clients in gone.items() if stage != "reveal" for i in clients}
    want = simulated(SECURE, {(2, i) for i in lost})
    assert lost_of(got) == {(2, i) for i in lost}
    assert {i for number, i in revealing if number == 2} == set(range(9)) - lost
    assert not any(r.kept_eta for r in got.history)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert [c.index for c in got.history[1].clients] == [c.index for c in CLIENTS]


@pytest.mark.parametrize("stage", secure_node.STAGES)
def test_below_two_thirds_nothing_is_unmasked_and_the_run_goes_on(stage: str, tmp_path: Path) -> None:
    gone, stages = (0, 1, 5, 8), secure_node.STAGES
    lose, asked = losing({stage: gone}, [2]), set()

    def change(number: int, request: Message, reply: Message) -> Message | None:
        asked.update({request_of(request)["ask"]} if request_of(request).get("number") == 2 else ())
        return lose(number, request, reply)

    got = federated(SECURE, tmp_path, change)
    assert asked == set(stages[: stages.index(stage) + 1])  # nobody is asked for more
    first, second, third = got.history
    assert not first.kept_eta and not third.kept_eta
    assert "5 of 9 clients answered" in second.kept_eta or "clients are left" in second.kept_eta
    want = simulated(SECURE, {(2, i) for i in gone})  # which keeps the model in round 2 as well
    assert want.history[1].kept_eta and equal(tree.flatten(got.eta), tree.flatten(want.eta))


@pytest.mark.parametrize("stage", secure_node.STAGES)
def test_replies_that_never_come_or_are_garbage_lose_their_node_alone(stage: str, tmp_path: Path) -> None:
    for name, garbage in (("late", None), ("garbage", b"x"), ("short", bundle.pack({"clients": []}))):

        def change(number: int, request: Message, reply: Message, garbage: bytes | None = garbage) -> Message | None:
            if request_of(request)["ask"] != stage or request.metadata.dst_node_id != 101:
                return reply
            return None if garbage is None else mail.reply(request, garbage)

        got = federated(SECURE, tmp_path / name, change, rounds=1)
        lost = set() if stage == "reveal" else {1, 4, 7}
        assert {c.index for c in got.history[0].lost()} == lost and not got.history[0].kept_eta
        want = simulated(SECURE, {(1, i) for i in lost}, rounds=1)
        assert equal(tree.flatten(got.eta), tree.flatten(want.eta))


@pytest.mark.parametrize("stage", ["keys", "shares", "reveal"])
def test_a_message_of_the_wrong_length_loses_its_client_alone(stage: str, tmp_path: Path) -> None:
    def change(number: int, request: Message, reply: Message) -> Message:
        header, parts = bundle.unpack(mail.blob(reply), 1 << 20)
        if request_of(request)["ask"] == stage and request.metadata.dst_node_id == 101:
            parts[0] = parts[0][:-1]
        return mail.reply(request, bundle.pack(header, parts))

    got = federated(SECURE, tmp_path, change, rounds=1)
    lost = set() if stage == "reveal" else {1}
    assert {c.index for c in got.history[0].lost()} == lost and not got.history[0].kept_eta
    want = simulated(SECURE, {(1, i) for i in lost}, rounds=1)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))


@pytest.mark.parametrize("stage", secure_node.STAGES)
def test_a_client_that_was_not_asked_for_counts_at_no_stage(stage: str, tmp_path: Path) -> None:
    """Node 1 answers for client 0 of node 0 as well; where vectors are sent, the records say so."""

    def change(number: int, request: Message, reply: Message) -> Message:
        header, parts = bundle.unpack(mail.blob(reply), 1 << 20)
        if request_of(request)["ask"] != stage or request.metadata.dst_node_id != 101:
            return reply
        header["clients"].append({**header["clients"][0], "client": 0})
        return mail.reply(request, bundle.pack(header, [*parts, parts[0]]))

    got, want = federated(SECURE, tmp_path, change, rounds=1), simulated(SECURE, rounds=1)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    strange = [(c.index, c.client, c.status) for c in got.history[0].lost()]
    assert strange == ([(-1, "node of partition 1", "rejected")] if stage == "masked" else [])
    rows = [c for c in without_seconds(got.history)[0].clients if c.index >= 0]
    assert rows == list(hidden(want.history)[0].clients)


def recorded(folder: Path, **fields: Any) -> tuple[fp.Result, dict[int, np.ndarray], list[bytes]]:
    """A run, the words of its first round that the server got by client, and all of the replies' bytes."""
    seen: dict[int, np.ndarray] = {}
    blobs: list[bytes] = []

    def change(number: int, request: Message, reply: Message) -> Message:
        header, parts = bundle.unpack(mail.blob(reply), 1 << 20)
        if request_of(request)["ask"] == "masked" and request_of(request)["number"] == 1:
            words = (np.frombuffer(part[16:], "<u4") for part in parts)
            seen.update(zip([entry["client"] for entry in header["clients"]], words, strict=True))
        blobs.append(mail.blob(reply))
        return reply

    return federated(SECURE, folder, change, **fields), seen, blobs


def test_the_server_sees_masked_vectors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a vector nor a secret is in what it gets; the same client's vector looks different in another run."""
    plain: dict[int, np.ndarray] = {}
    true, secrets, random = secure.masked, [], secure_node.os.urandom

    def masked(state: Any, words: np.ndarray) -> np.ndarray:
        plain.setdefault(state.index, words.copy())
        return true(state, words)

    def urandom(length: int) -> bytes:
        secrets.append(random(length))
        return secrets[-1]

    monkeypatch.setattr(secure, "masked", masked)
    monkeypatch.setattr(secure_node.os, "urandom", urandom)
    first, seen, blobs = recorded(tmp_path / "a")
    second, again, _ = recorded(tmp_path / "b")
    assert equal(tree.flatten(first.eta), tree.flatten(second.eta))
    assert seen.keys() == plain.keys() == {c.index for c in CLIENTS}
    for index, words in plain.items():
        assert np.mean(seen[index] == words) < 0.1 and np.mean(again[index] == seen[index]) < 0.1
        assert not any(words.tobytes() in blob for blob in blobs)
    assert len(secrets) == 2 * ROUNDS * (len(CLIENTS) + NODES) == len(set(secrets))  # a node has one for noise
    assert not any(secret in blob or secret.hex().encode() in blob for secret in secrets for blob in blobs)
    total = sum(plain.values())
    assert isinstance(total, np.ndarray) and not np.array_equal(sum(seen.values()), total)


def test_secrets_are_their_nodes_alone_and_forgotten_after_the_round(tmp_path: Path) -> None:
    modes: set[int] = set()
    held: list[int] = []

    def change(number: int, request: Message, reply: Message) -> Message:
        for path in (tmp_path / "states").glob("*/secure/*"):
            modes.add(path.parent.stat().st_mode & 0o777)
            session = secure_node.Session.read(path)
            assert session is not None
            held.append(len(session.secrets))
        return reply

    federated(SECURE, tmp_path, change)
    assert modes == {0o700} and 3 in held
    left = [secure_node.Session.read(path) for path in (tmp_path / "states").glob("*/secure/*")]
    assert len(left) == NODES and all(s is not None and not s.secrets and not s.boxes for s in left)


def test_a_resumed_federation_has_the_bits_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    federated(SECURE, tmp_path, rounds=2)
    got, want = federated(SECURE, tmp_path, resume=True), simulated(SECURE)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert without_seconds(got.history) == hidden(want.history)


def test_the_layout_of_a_node_is_that_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its vectors are refused: here the node thinks that another round is on."""
    true = Layout.pack
    monkeypatch.setattr(Layout, "pack", lambda self, words: true(replace(self, number=self.number + 1), words))
    got = federated(SECURE, tmp_path, rounds=1)
    assert {c.status for c in got.history[0].clients} == {"rejected"} and got.history[0].kept_eta
