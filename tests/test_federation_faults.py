"""Faults of a federation: mutated replies and requests, clients lost by the half, a full disk, a clock that jumps."""

from __future__ import annotations

import itertools
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedprior as fp
from cases import Lost, equal, lost_of
from draws import torn
from fedprior import tree, wire
from fedprior.privacy import SecureSum
from fedprior.rng import numpy_generator

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from flwr.app import Message  # pyright: ignore[reportMissingImports]

from fedprior.codecs import PayloadError
from fedprior.federation import GridEngine, Node, Roster, bundle, client_app, replies
from fedprior.federation.replies import Asked
from fedprior_node import mail
from grid import CLIENTS, COHORT, MODEL, NODES, ROUNDS, LocalGrid, federated, own, simulated
from stateful import states_of_the_last_accepted
from test_faults import Full

FEDAVG = fp.fedavg(0.1)
MOST = 50


@pytest.mark.parametrize("algorithm", [FEDAVG, fp.topk(0.1, 0.2), fp.fedper(0.1)], ids=lambda a: a.name)
def test_half_of_the_clients_lost_in_each_round(algorithm: fp.Algorithm, tmp_path: Path) -> None:
    """A random half of each reply is missing: model and states are those of a simulation with the same drop-outs."""

    def change(number: int, request: Message, reply: Message) -> Message:
        header, parts = bundle.unpack(mail.blob(reply), 1 << 20)
        if "clients" not in header:
            return reply
        kept = numpy_generator(0, "half", number).random(len(parts)) < 0.5
        header["clients"] = list(itertools.compress(header["clients"], kept))
        return mail.reply(request, bundle.pack(header, list(itertools.compress(parts, kept))))

    got = federated(algorithm, tmp_path, change, cohort=0, rounds=6)
    want = simulated(algorithm, cohort=None, rounds=6, availability=Lost(lost_of(got)))
    assert 10 < len(lost_of(got)) < 32  # of 42
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))


@pytest.mark.parametrize("algorithm", [fp.topk(0.1, 0.2), fp.scaffold(0.1)], ids=lambda a: a.name)
def test_a_request_that_a_node_finds_after_a_later_one_changes_nothing(algorithm: fp.Algorithm, tmp_path: Path) -> None:
    """Its SuperNode was stopped: round 2's request is there after that of round 3, whose states have been accepted."""
    found: dict[str, bytes] = {}

    def change(number: int, request: Message, reply: Message) -> Message | None:
        header, _ = bundle.unpack(mail.blob(request), 1 << 20)
        if request.metadata.dst_node_id == 101 and header.get("number") == 2:
            found["request"] = mail.blob(request)
            return None
        if request.metadata.dst_node_id == 101 and header.get("number") == 3:
            node = Node(algorithm, own, MODEL, state=tmp_path / "states")
            found["reply"] = node.answer(found["request"], 1, NODES)
        return reply

    got = federated(algorithm, tmp_path, change, cohort=0)
    want = simulated(algorithm, cohort=None, availability=Lost(lost_of(got)))
    assert {number for number, _ in lost_of(got)} == {2}
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    (states,) = (tmp_path / "states").iterdir()
    states_of_the_last_accepted(states, got.history, want.store)
    header, _ = bundle.unpack(found["reply"], 1 << 20)
    assert all("round 2 is over for client" in entry["reason"] for entry in header["clients"])


@pytest.mark.parametrize("algorithm", [fp.topk(0.1, 0.2), fp.scaffold(0.1)], ids=lambda a: a.name)
def test_a_node_whose_disk_is_full_loses_the_client_and_no_state(
    algorithm: fp.Algorithm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the states of round 2 on the node of partition 1 half of the first is written, and nothing more."""
    opened, number = Path.open, re.compile(r"client-[14]\.round-2\.")
    monkeypatch.setattr(Full, "writes", 0)
    monkeypatch.setattr(Full, "room", 1)

    def limited(self: Path, mode: str = "r", *args: Any, **fields: Any) -> Any:
        file = opened(self, mode, *args, **fields)
        return Full(file) if mode[0] in "wa" and number.search(self.name) else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", limited)
        got = federated(algorithm, tmp_path, cohort=0)
    lost = got.history[1].lost()
    assert {(c.index, c.status) for c in lost} == {(1, "failed"), (4, "failed")}
    assert all("No space left on device, while writing" in c.reason for c in lost)
    want = simulated(algorithm, cohort=None, availability=Lost(lost_of(got)))
    assert lost_of(got) == {(2, 1), (2, 4)} and equal(tree.flatten(got.eta), tree.flatten(want.eta))
    (states,) = (tmp_path / "states").iterdir()
    states_of_the_last_accepted(states, got.history, want.store)
    assert not list(states.rglob(".*.tmp"))


def test_a_federation_does_not_look_at_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It jumps ahead by more than the deadline at every look, and nobody is late."""
    ticks = itertools.count(time.time(), 86400.0)
    want = simulated(FEDAVG)
    grid = LocalGrid(client_app(FEDAVG, own, MODEL), NODES)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(ticks))
        engine = GridEngine(grid, NODES, seconds=30)
        roster = Roster(len(CLIENTS), CLIENTS[0].train)
        got = fp.run(FEDAVG, MODEL, roster, rounds=ROUNDS, engine=engine, cohort=COHORT)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta)) and not lost_of(got)
    assert all(0 <= r.seconds < 30 for r in got.history)


def test_a_node_trains_its_own_clients_alone() -> None:
    """It has all of the federation's, and is asked for 0, 1 and 4; of its own, its data give 7 for 4."""
    clients = {c.index: c for c in CLIENTS} | {4: replace(CLIENTS[4], index=7)}
    head = {"ask": "round", "run": "r", "seed": 0, "rounds": 2, "cohort": 2, "number": 1, "population": 7}
    head |= {"noise": None, "clip": 0.0, "clients": [[i, 0] for i in (0, 1, 4)]}
    down = wire.encode_eta(FEDAVG, FEDAVG.start({k: v.detach() for k, v in MODEL.named_parameters()})[0])
    reply, payloads = bundle.unpack(Node(FEDAVG, clients, MODEL).answer(bundle.pack(head, [down]), 1, NODES), 1 << 20)
    stranger, own_client, odd = reply["clients"]
    assert "client 0 does not live on the node of partition 1 of 3" in stranger["reason"]
    assert "the data give client 7 for client 4" in odd["reason"]
    assert own_client["status"] == "ok" and [len(p) > 0 for p in payloads] == [False, True, False]


def mutated(data: bytes, name: str, k: int) -> bytes:
    """One to three bytes changed; in one of five also cut."""
    return torn(data, numpy_generator(0, name, k), k % 5 == 0)


counts = pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])


@counts
def test_mutated_replies_are_read_or_refused(count: int) -> None:
    """The reader never raises; each client asked has one upload, and what is ok is within its bounds."""
    entry = {"status": "ok", "examples": 6, "seconds": 0.5, "seconds_wire": 0.25}
    asked = {i: Asked(f"client-{i}", 10) for i in (0, 3, 6)}
    good = bundle.pack({"clients": [{"client": i, **entry} for i in asked]}, [b"abc"] * 3)
    assert {u.status for u in replies.read(good, asked, MOST).uploads.values()} == {"ok"}
    seen = set()
    for k in range(count):
        reply = replies.read(mutated(good, "reply", k), asked, MOST)
        assert reply.uploads.keys() == asked.keys()
        for index, upload in reply.uploads.items():
            seen.add(upload.status)
            assert upload.index == index and upload.client == f"client-{index}" and upload.bytes_down == 10
            if upload.status == "ok":
                assert type(upload.examples) is int and 1 <= upload.examples <= MOST
                assert 0 <= upload.seconds < float("inf") and 0 <= upload.seconds_wire < float("inf")
            else:
                assert upload.reason and upload.status in ("rejected", "failed")
    assert seen >= {"ok", "rejected"}


@counts
def test_mutated_greetings_are_read_or_refused(count: int) -> None:
    good = bundle.pack({"hello": {"partition": 1, "partitions": 3, "version": "1"}})
    read = 0
    for k in range(count):
        try:
            said = replies.hello(mutated(good, "hello", k))
        except PayloadError:
            continue
        read += 1
        assert type(said["partition"]) is int and type(said["partitions"]) is int
    assert 0 < read < count


@counts
def test_mutated_requests_are_answered(count: int, tmp_path: Path) -> None:
    """A node never raises, writes nothing outside its folder of states, and its reply can be read."""
    node = Node(FEDAVG, own, MODEL, state=tmp_path / "states")
    head = {"ask": "round", "run": "r", "seed": 0, "rounds": 2, "cohort": 2, "number": 1, "clients": [[0, 0]]}
    head |= {"population": 3, "noise": None, "clip": 0.0}
    good = bundle.pack(head, [b"no payload"])  # refused where it is decoded, before any training
    asked, seen = {0: Asked("client-0", 10)}, set()
    for k in range(count):
        reply = replies.read(node.answer(mutated(good, "request", k), 0, NODES), asked, MOST)
        seen.add(reply.uploads[0].status)
    assert "failed" in seen and seen <= {"failed", "rejected"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ask", ["keys", "shares", "masked", "reveal"])
def test_mutated_requests_of_a_secure_sum_are_answered(ask: str, count: int, tmp_path: Path) -> None:
    """Nor do they make a node train, as it has no session that they fit; it writes its own session alone."""
    algorithm = replace(fp.fedavg(0.1, weighting="uniform"), secure=SecureSum())
    node = Node(algorithm, own, MODEL, state=tmp_path / "states")
    head = {"ask": ask, "run": "r", "seed": 0, "rounds": 2, "cohort": 2, "number": 1, "clients": [[0, 0]]}
    good = bundle.pack(
        head | {"population": 3, "noise": None, "clip": 0.0}, [b"x" * 40] * (2 if ask == "masked" else 1)
    )
    asked, seen = {0: Asked("client-0", 10)}, set()
    for k in range(count // 4):
        reply = replies.read(node.answer(mutated(good, ask, k), 0, NODES), asked, 0)
        seen.add(reply.uploads[0].status)
    assert seen <= {"ok", "failed", "rejected"} and "failed" in seen and ("ok" in seen) == (ask == "keys")
    assert {path.name for path in (tmp_path / "states").rglob("*") if path.is_file()} <= {"partition-0"}
    assert [path.name for path in tmp_path.iterdir()] in ([], ["states"])
