"""Whatever comes from a node: it is dropped and reported, and the round goes on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedprior as fp
from cases import equal, without_seconds
from fedprior import checkpoint, tree

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict  # pyright: ignore

from fedprior.federation import bundle
from fedprior_node import mail
from grid import CLIENTS, NODES, LocalGrid, federated, own, simulated

FEDAVG = fp.fedavg(0.1)


def round_of(request: Message, node: int, number: int) -> bool:
    """Is this node's message of this round? Hellos come before round one."""
    header, _ = bundle.unpack(mail.blob(request), 1 << 20)
    return request.metadata.dst_node_id == 100 + node and header.get("number") == number


def rewritten(edit: Any) -> Any:
    """A reply whose header or parts were edited."""

    def change(request: Message, reply: Message) -> Message:
        header, parts = bundle.unpack(mail.blob(reply), 1 << 20)
        edit(header["clients"], parts)
        return mail.reply(request, bundle.pack(header, parts))

    return change


def content(record: Any) -> Any:
    return lambda request, reply: Message(RecordDict(record), reply_to=request)


def blob(edit: Any) -> Any:
    return lambda request, reply: mail.reply(request, edit(mail.blob(reply)))


def array(stype: str, data: bytes = b"FEDB") -> ArrayRecord:
    return ArrayRecord({"blob": Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)})


def huge_header(data: bytes) -> bytes:
    return bundle.pack({"clients": [], "filler": "x" * (1 << 20)})


def raw(header: bytes) -> bytes:
    return (1).to_bytes(4, "little") + len(header).to_bytes(4, "little") + header


NEVER = ("late", "no answer within")
BROKEN = {
    "no answer": (lambda request, reply: None, *NEVER),
    "error": (lambda request, reply: Message(Error(8, "it crashed"), reply_to=request), "dropped", "8: it crashed"),
    "empty": (content({}), "rejected", "instead of the ArrayRecord"),
    "other record": (content({"fedprior": ConfigRecord({"blob": b"FEDB"})}), "rejected", "ArrayRecord"),
    "more records": (content({"fedprior": array(mail.STYPE), "x": ConfigRecord({})}), "rejected", "ArrayRecord"),
    "no array": (content({"fedprior": ArrayRecord({})}), "rejected", "holds the arrays"),
    "wrong stype": (content({"fedprior": array("numpy.ndarray")}), "rejected", "'numpy.ndarray'"),
    "short": (blob(lambda data: data[:7]), "rejected", "7 bytes"),
    "magic": (blob(lambda data: b"PK" + data[2:]), "rejected", "magic"),
    "cut": (blob(lambda data: data[:-1]), "rejected", "parts of"),
    "longer": (blob(lambda data: data + b"\0"), "rejected", "parts of"),
    "not JSON": (blob(lambda data: data[:12] + b"!" + data[13:]), "rejected", "not JSON"),
    "huge header": (blob(huge_header), "rejected", "at most"),
    "deep header": (blob(lambda data: b"FEDB" + raw(b"[" * 90000)), "rejected", "not JSON"),
    "a list": (blob(lambda data: b"FEDB" + raw(b"[]")), "rejected", "not a JSON object"),
    "negative part": (blob(lambda data: b"FEDB" + raw(b'{"parts": [-1, 1]}')), "rejected", "no lengths"),
    "no clients": (blob(lambda data: bundle.pack({})), "rejected", "as many"),
    "entry missing": (rewritten(lambda c, p: (c.pop(), p.pop())), "rejected", "does not have this client"),
    "entries no objects": (
        rewritten(lambda c, p: c.__setitem__(slice(None), [7] * len(c))),
        "rejected",
        "does not have",
    ),
    "twice": (rewritten(lambda c, p: (c.append(c[-1]), p.append(p[-1]))), "rejected", "twice"),
    "payload cut": (rewritten(lambda c, p: p.append(p.pop()[:-1])), "rejected", "body of"),
    "payload oversized": (rewritten(lambda c, p: p.append(p.pop() + bytes(10**7))), "rejected", "at most"),
    "examples bool": (rewritten(lambda c, p: c[-1].update(examples=True)), "rejected", "number of examples"),
    "examples none": (rewritten(lambda c, p: c[-1].update(examples=0)), "rejected", "number of examples"),
    "examples many": (rewritten(lambda c, p: c[-1].update(examples=10**9)), "rejected", "number of examples"),
    "examples other": (rewritten(lambda c, p: c[-1].update(examples=1000)), "rejected", "count of clients"),
    "seconds": (rewritten(lambda c, p: c[-1].update(seconds="1")), "rejected", "seconds"),
    "negative seconds": (rewritten(lambda c, p: c[-1].update(seconds=-1.0)), "rejected", "seconds"),
    "status": (rewritten(lambda c, p: c[-1].update(status="fine")), "rejected", "neither ok nor failed"),
    "node fails": (blob(lambda data: bundle.pack({"failed": "no disk"})), "failed", "no disk"),
}


class Dropping(fp.Availability):
    """These clients do not answer in round 2."""

    def __init__(self, *lost: int) -> None:
        object.__setattr__(self, "lost", lost)

    def status(self, seed: int, number: int, index: int, examples: int) -> Any:
        return "dropped" if number == 2 and index in self.lost else "ok"  # type: ignore


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reply_is_dropped_and_reported_and_the_round_goes_on(case: str, tmp_path: Path) -> None:
    """Node 1 sends something else in round 2; the model is that of a simulation in which its clients dropped out."""
    change, status, reason = BROKEN[case]

    def once(number: int, request: Message, reply: Message) -> Message | None:
        return change(request, reply) if round_of(request, 1, 2) else reply

    got = federated(FEDAVG, tmp_path, once, cohort=0)
    lost = [c for c in got.history[1].lost() if c.index >= 0]
    assert lost and {c.index % NODES for c in lost} == {1} and {c.status for c in lost} == {status}
    assert all(re.search(reason, c.reason) for c in lost)
    want = simulated(FEDAVG, cohort=None, availability=Dropping(*(c.index for c in lost)))
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert [len(r.lost()) > 0 for r in got.history] == [False, True, False, False]


def test_a_message_that_comes_again_and_again_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in one look, and at every later one: bits, bytes and records are those of the simulation, at once."""

    def pull(self: LocalGrid, message_ids: Any) -> list[Any]:
        return [self.box[i] for i in message_ids if i in self.box for _ in range(2)]

    monkeypatch.setattr(LocalGrid, "pull_messages", pull)
    got, want = federated(FEDAVG, tmp_path, rounds=2, seconds=15.0), simulated(FEDAVG, rounds=2)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert without_seconds(got.history) == without_seconds(want.history)
    assert max(r.seconds for r in got.history) < 15


def test_ids_that_were_not_asked_for_are_reported(tmp_path: Path) -> None:
    """An upload under the name of another node's client does not count, nor does it push that client out."""

    def steal(clients: list[Any], parts: list[bytes]) -> None:
        clients.append({**clients[0], "client": 0})
        parts.append(parts[0])

    def change(number: int, request: Message, reply: Message) -> Message:
        return rewritten(steal)(request, reply) if round_of(request, 1, 2) else reply

    got, want = federated(FEDAVG, tmp_path, change, cohort=0), simulated(FEDAVG, cohort=None)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    (strange,) = got.history[1].lost()
    assert (strange.index, strange.client, strange.status) == (-1, "node of partition 1", "rejected")
    assert strange.reason.endswith("not asked for: 0")


class Broken(dict):
    """The clients of a node, of which number 4 raises in its second round."""

    asked = 0

    def __getitem__(self, index: int) -> fp.Client:
        if index == 4:
            self.asked += 1
            if self.asked == 2:
                raise RuntimeError("the scanner is off")
        return super().__getitem__(index)


def test_a_clients_exception_comes_back_as_text(tmp_path: Path) -> None:
    nodes: dict[int, Broken] = {}

    def data(partition: int, partitions: int) -> Broken:
        nodes[partition] = Broken({c.index: c for c in own(partition, partitions)})
        return nodes[partition]

    result = federated(FEDAVG, tmp_path, data=data, cohort=0)
    (failed,) = [c for r in result.history for c in r.lost()]
    assert (failed.index, failed.client, failed.status) == (4, "client-4", "failed")
    assert "RuntimeError: the scanner is off" in failed.reason
    assert "1 of 28 clients failed" in result.summary() and "the scanner is off" in result.summary()


def test_training_that_raises_tells_client_and_round(tmp_path: Path) -> None:
    def data(partition: int, partitions: int) -> list[fp.Client]:
        labels = [replace(c, train=replace(c.train, y=c.train.y + 9 * (c.index == 4))) for c in CLIENTS]
        return labels[partition::partitions]

    result = federated(FEDAVG, tmp_path, data=data, cohort=0, rounds=1)
    (failed,) = result.history[0].lost()
    assert "in round 1, client 'client-4' (index 4), seed 0" in failed.reason and "Error" in failed.reason


def test_a_lost_upload_leaves_the_clients_state_as_it_was(tmp_path: Path) -> None:
    """Error feedback: what a refused upload carried is sent again, as in a simulation where the client was dropped."""
    algorithm = fp.topk(0.1, 0.2)

    def change(number: int, request: Message, reply: Message) -> Message | None:
        cut = rewritten(lambda c, p: p.append(p.pop()[:-1]))
        return cut(request, reply) if round_of(request, 1, 2) else reply

    lost = federated(algorithm, tmp_path, change, cohort=0).history[1].lost()[0].index

    want = simulated(algorithm, cohort=None, availability=Dropping(lost))
    got = checkpoint.read(tmp_path / "out")
    assert got is not None and equal(got.eta, tree.flatten(want.eta))
