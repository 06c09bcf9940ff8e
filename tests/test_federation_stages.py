"""A node under secure aggregation, asked stage by stage: what it answers, once, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedprior as fp
from fedprior.privacy import masks, secure

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from fedprior.federation import Node, bundle
from grid import MODEL
from test_federation_secure import CLIENTS, SECURE


class Asked:
    """A node of nine clients, asked stage by stage."""

    def __init__(self, folder: Path, algorithm: fp.Algorithm = SECURE) -> None:
        self.node, self.folder = Node(algorithm, CLIENTS, MODEL, state=folder), folder
        self.head = {"run": "r", "seed": 0, "rounds": 2, "cohort": 9, "number": 1}
        self.head |= {"population": 9, "noise": None, "clip": 0.0}
        self.ids = list(range(9))

    def __call__(self, ask: str, *parts: bytes, ids: Any = None, **fields: Any) -> tuple[list[str], list[bytes]]:
        """The reasons of those that failed, and the payloads."""
        clients = [[i, 0] for i in (self.ids if ids is None else ids)]
        reply = self.node.answer(bundle.pack({"ask": ask, **self.head, "clients": clients} | fields, parts), 0, 1)
        header, payloads = bundle.unpack(reply, 1 << 20)
        if "failed" in header:
            return [header["failed"]], []
        return [e["reason"] for e in header["clients"] if e["status"] == "failed"], payloads

    def down(self) -> bytes:
        return fp.wire.encode_eta(SECURE, SECURE.start({k: v.detach() for k, v in MODEL.named_parameters()})[0])

    def keyed(self) -> bytes:
        _, keys = self("keys")
        return secure.roster(dict(zip(self.ids, keys, strict=True)))

    def shared(self) -> list[bytes]:
        roster = self.keyed()
        _, sent = self("shares", roster)
        boxes = secure.deliver(roster, dict(zip(self.ids, sent, strict=True)))
        return [boxes[i] for i in self.ids]

    def masked(self) -> None:
        reasons, _ = self("masked", self.down(), *self.shared())
        assert not reasons


def test_a_stage_is_answered_once_in_a_round(tmp_path: Path) -> None:
    """The same request again gets the same answer; another one, which might tell a difference, gets none."""
    ask = Asked(tmp_path)
    roster = ask.keyed()
    first, again = ask("shares", roster), ask("shares", roster)
    assert first == again and not first[0]
    other = secure.roster({**masks.read_roster(roster), 9: bytes(range(64))})
    assert "asked twice for shares" in ask("shares", other)[0][0]
    boxes = secure.deliver(roster, dict(enumerate(first[1])))
    request = [ask.down(), *(boxes[i] for i in ask.ids)]
    vectors = ask("masked", *request)
    assert vectors == ask("masked", *request) and not vectors[0]
    moved = SECURE.start({k: v.detach() + 1 for k, v in MODEL.named_parameters()})[0]
    assert "asked twice for masked" in ask("masked", fp.wire.encode_eta(SECURE, moved), *request[1:])[0][0]
    assert "asked twice for masked" in ask("masked", *request[:-1], ids=range(8))[0][0]
    reasons, shares = ask("reveal", secure.request(ask.ids, ask.ids))
    assert not reasons and len(shares) == 9
    assert "has not begun, or is over" in ask("reveal", secure.request(ask.ids, ask.ids))[0][0]


def test_a_round_that_is_run_again_is_revealed_for_the_same_clients_or_not_at_all(tmp_path: Path) -> None:
    """Two sums of the same vectors that differ by one client would tell that client's."""
    ask = Asked(tmp_path)
    ask.masked()
    assert not ask("reveal", secure.request(ask.ids, ask.ids[:8]), ids=range(8))[0]
    ask.masked()
    assert "asked twice for reveal" in ask("reveal", secure.request(ask.ids, ask.ids))[0][0]
    ask.masked()
    assert not ask("reveal", secure.request(ask.ids, ask.ids[:8]), ids=range(8))[0]
    ask.head["number"] = 2
    ask.masked()
    assert not ask("reveal", secure.request(ask.ids, ask.ids))[0]


def test_a_request_of_an_earlier_round_ends_no_later_one(tmp_path: Path) -> None:
    """A SuperNode that was stopped finds it. Between two rounds 2 it would let the second be revealed for others."""
    ask = Asked(tmp_path)
    for revealed in (False, True):
        ask.head["number"] = 2
        boxes = ask.shared()
        assert "round 1 is over: round 2 has begun" in ask("keys", number=1)[0][0]
        assert not ask("masked", ask.down(), *boxes)[0]
        if not revealed:
            assert not ask("reveal", secure.request(ask.ids, ask.ids[:8]), ids=range(8))[0]
            assert "round 1 is over" in ask("keys", number=1)[0][0]
    assert "asked twice for reveal" in ask("reveal", secure.request(ask.ids, ask.ids))[0][0]


def test_what_a_node_refuses(tmp_path: Path) -> None:
    ask = Asked(tmp_path)
    assert "has not begun" in ask("shares", b"")[0][0]
    assert "asked for 'round'" in ask("round", ask.down())[0][0]  # an open upload
    assert "keys, shares, masked, reveal alone" in ask("", ask.down())[0][0]
    roster = ask.keyed()
    assert "which has not begun" in ask("shares", roster, number=2)[0][0]
    short = secure.roster(dict(list(masks.read_roster(roster).items())[:5]))
    reasons, _ = ask("shares", short)
    assert len(reasons) == 9 and "5 of 9 clients are left, and 6 are needed" in reasons[0]
    for number, alive in ((2, ask.ids[:5]), (3, ask.ids[1:])):  # too few; client 0, of whom it says that it is gone
        ask.head["number"] = number
        ask.masked()
        reasons, payloads = ask("reveal", secure.request(ask.ids, alive), ids=[0])
        assert "are needed" in reasons[0] and payloads == [b""]
    reasons, _ = Asked(tmp_path / "b")("masked", ask.down(), *[b""] * 9)
    assert "has not begun" in reasons[0]
    ask = Asked(tmp_path / "c")
    ask.keyed()
    reasons, payloads = ask("masked", ask.down(), *[b""] * 9)  # without the others there would be no pair masks
    assert len(reasons) == 9 and set(payloads) == {b""}
    assert "does not have the keys" in reasons[0]
    far = Asked(tmp_path / "d")
    assert (
        "do not live on the node"
        in bundle.unpack(far.node.answer(bundle.pack({"ask": "keys", **far.head, "clients": [[1, 0]]}), 0, 2), 1 << 20)[
            0
        ]["failed"]
    )


def test_the_shares_of_a_smaller_roster_need_two_thirds_of_the_cohort_too(tmp_path: Path) -> None:
    """7 of 9 clients have keys, 5 of them answered: two thirds of 7, and not of 9."""
    ask = Asked(tmp_path)
    ask.ids = ask.ids[:7]
    ask.masked()
    reasons, _ = ask("reveal", secure.request(ask.ids, ask.ids[:5]), ids=range(5))
    assert len(reasons) == 5 and "5 of 9 clients are left, and 6 are needed" in reasons[0]
    ask.head["number"] = 2
    ask.masked()
    assert not ask("reveal", secure.request(ask.ids, ask.ids[:6]), ids=range(6))[0]
