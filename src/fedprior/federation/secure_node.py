"""Secure aggregation on a node: what its clients keep to themselves for the length of a round.

    ask       from the server                               from each client
    keys      the clients of the round                      public keys of fresh secrets
    shares    everybody's public keys                       sealed shares
    masked    eta, and for each client the others' shares   a masked vector; training happens here
    reveal    who answered, who did not                     shares; after that the secrets are forgotten

A node has one session a round, in a folder of its user alone, since Flower may start a process a message. Each
stage is answered once. The same request again gets the same answer, for a worker may be killed while it answers;
another one is refused, as two vectors under the same masks tell their difference. For the same reason a round that is
run again, after a crash of the server, is revealed for the same clients as before, or not at all; and the noise of
privacy=..., which a node draws from secrets of its own, is then the same, or two sums would tell more than one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedprior.federation import bundle
from fedprior.layer import Setting
from fedprior.privacy import secure
from fedprior.privacy.masks import SecureError, read_request, threshold_for
from fedprior.privacy.sealed import Sealed, layout
from fedprior.privacy.secure import ClientState
from fedprior.records import write_atomically
from fedprior.rng import noise_generator
from fedprior.round import RoundWork

STAGES = ("keys", "shares", "masked", "reveal")
LONGEST = 1 << 26  # bytes of a session's header


@dataclass
class Session:
    """One round of a node's clients.

    Attributes:
        path: of its file.
        number: of the round.
        cohort: clients of the round on all nodes; two thirds must stay.
        secrets: client -> 32 bytes; empty once the round is over.
        roster: everybody's public keys.
        boxes: client -> what the others sent to it.
        asked: stage -> digest of what was asked.
        key: 32 bytes that noise is drawn from; kept while the round may be run again.
        task: digest of what is trained, for which the noise is.
    """

    path: Path
    number: int
    cohort: int
    secrets: dict[int, bytes] = field(default_factory=dict, repr=False)
    roster: bytes = field(default=b"", repr=False)
    boxes: dict[int, bytes] = field(default_factory=dict, repr=False)
    asked: dict[str, str] = field(default_factory=dict)
    key: bytes = field(default=b"", repr=False)
    task: str = ""

    @classmethod
    def read(cls, path: Path) -> Session | None:
        """The last one of this node, if there is one."""
        if not path.exists():
            return None
        header, (key, roster, *rest) = bundle.unpack(path.read_bytes(), LONGEST)
        indices = header["clients"]
        secrets, boxes = dict(zip(indices, rest, strict=False)), dict(zip(indices, rest[len(indices) :], strict=False))
        return cls(path, header["number"], header["cohort"], secrets, roster, boxes, header["asked"], key)

    def write(self) -> None:
        """Keep it, before anything is answered."""
        header = {"number": self.number, "cohort": self.cohort, "clients": list(self.secrets), "asked": self.asked}
        boxes = [self.boxes.get(i, b"") for i in self.secrets]
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(self.path, bundle.pack(header, [self.key, self.roster, *self.secrets.values(), *boxes]))

    def once(self, header: dict[str, Any], parts: Sequence[bytes]) -> None:
        """A SecureError if the stage was answered to another request; a resumed run may reveal with more rounds."""
        stage = header["ask"]
        digest = _digest({"clients": _indices(header)} if stage == "reveal" else header, parts)
        if self.asked.setdefault(stage, digest) != digest:
            raise SecureError(f"round {self.number} was asked twice for {stage}, in different words")

    def bare(self, index: int) -> ClientState:
        """Of one client, which knows nobody yet."""
        if index not in self.secrets:
            raise SecureError(f"client {index} has no keys in round {self.number}")
        return ClientState(index, self.secrets[index])

    def enrolled(self, index: int) -> ClientState:
        """Of one client that knows the others: as many as must stay, at least."""
        state = secure.enrol(self.bare(index), self.roster)
        self._enough(len(state.keys))
        return state

    def state(self, index: int) -> ClientState:
        """Of one client that has the others' shares."""
        return secure.receive(self.enrolled(index), self.boxes.get(index, b""))

    def reveal(self, index: int, request: bytes) -> bytes:
        """One client's shares."""
        self._enough(len(read_request(request)[0]))
        return secure.reveal(self.state(index), request)[0]

    def _enough(self, clients: int) -> None:
        if clients < (least := threshold_for(self.cohort)):
            raise SecureError(f"{clients} of {self.cohort} clients are left, and {least} are needed")

    def noise(self, index: int) -> np.random.Generator:
        """Of one client, from what this node alone knows: the same again for the same task, and for no other."""
        return noise_generator(int.from_bytes(self.key, "big"), self.task, index)

    def layer(self, work: RoundWork, most: float) -> Sealed:
        """What masks the uploads of this node, with the C of this round. Noise grows with C: the server may name any.

        A SecureError if the run has spent what the privacy of this node's algorithm allows.
        """
        privacy = work.algorithm.privacy
        if privacy is not None and privacy.spent(self.number - 1):
            raise SecureError(f"round {self.number} would exceed target_epsilon={privacy.target_epsilon:g}")
        setting = Setting(work.algorithm, work.schema, self.cohort, work.seed)
        made = layout(setting, self.number, work.common, most)
        return Sealed(work.algorithm, work.seed, self.number, most, made, self.cohort, self)


Say = Callable[[int], bytes]
"""What a client answers, by its index; a SecureError if it must not."""


def answer(header: dict[str, Any], parts: list[bytes], path: Path) -> Say | Session:
    """What the clients say at one stage; for `masked` the session, under which they train.

    Raises:
        SecureError: for requests that come out of turn, or twice.
    """
    stage, indices = header.get("ask"), _indices(header)
    session = Session.read(path)
    if stage == "keys":
        session = _begun(path, header, indices, session)
        return lambda index: secure.advertise(session.bare(index))
    if stage not in STAGES:
        raise SecureError(f"asked for {stage!r}: under secure=... a node answers {', '.join(STAGES)} alone")
    if session is None or session.number != header["number"] or not session.secrets:
        raise SecureError(f"asked for {stage} of round {header['number']}, which has not begun, or is over")
    session.once(header, parts)
    if stage == "shares":
        (session.roster,) = parts
        session.write()
        return lambda index: secure.share(session.enrolled(index))
    if stage == "masked":
        session.boxes = dict(zip(indices, parts[1:], strict=True))
        session.write()
        session.task = _digest(header, parts[:1])
        return session
    (request,) = parts
    replace(session, secrets={}, boxes={}).write()
    return lambda index: session.reveal(index, request)


def _indices(header: dict[str, Any]) -> list[int]:
    return [index for index, _ in header["clients"]]


def _digest(header: dict[str, Any], parts: Sequence[bytes]) -> str:
    return hashlib.sha256(bundle.pack(header, parts)).hexdigest()


def _begun(path: Path, header: dict[str, Any], indices: Sequence[int], old: Session | None) -> Session:
    """A new session, with fresh secrets; of a round that was revealed before, it remembers for whom.

    A SecureError for a round before the last one: what was revealed in that is known of the last session alone.
    """
    if old is not None and old.number > header["number"]:
        raise SecureError(f"round {header['number']} is over: round {old.number} has begun")
    session = Session(path, header["number"], header["cohort"], {i: os.urandom(32) for i in indices})
    session.key = os.urandom(32)
    if old is not None and old.number == session.number and "reveal" in old.asked:
        session.asked["reveal"], session.key = old.asked["reveal"], old.key
    session.write()
    return session
