"""Secure aggregation on a federation's server: four exchanges a round, of which it sees masked vectors alone.

    keys -> shares -> masked -> reveal        secure.py has the messages, secure_node.py the other side

Who does not answer a stage is not asked for the next one. Below two thirds of the cohort the round ends: nothing is
unmasked, and it counts as one without an update.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedprior.core import Client
from fedprior.federation.replies import Asked
from fedprior.privacy import secure, shamir
from fedprior.privacy.masks import KEYS_BYTES, SecureError, entries, threshold_for
from fedprior.round import RoundWork, Upload

if TYPE_CHECKING:
    from fedprior.federation.engine import GridEngine

log = logging.getLogger(__name__)


@dataclass
class Exchange:
    """One round's parties on the nodes of a grid: Parties of privacy/parties.py.

    Attributes:
        engine: which sends and receives.
        clients: of the cohort.
        roster, members, up, down: as in Parties.
        lost: what came of the clients that are no longer asked.
    """

    engine: GridEngine
    work: RoundWork
    clients: Sequence[Client]
    roster: bytes = b""
    members: list[int] = field(default_factory=list)
    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    lost: dict[int, Upload] = field(default_factory=dict)

    def uploads(self) -> Iterator[Upload]:
        """Keys, shares and training: what came of the clients, in their order; then what nobody asked for."""
        keys = {i: k for i, k in self._stage("keys").items() if self._fits(i, len(k) == KEYS_BYTES, "its keys")}
        self.roster = secure.roster(keys)
        sent = self._stage("shares", [self.roster])
        sent = {i: s for i, s in sent.items() if self._fits(i, _to(s) == keys.keys() - {i}, "its shares")}
        boxes = secure.deliver(self.roster, sent) if self._enough("masked") else {}
        self.members = sorted(boxes)
        down, asked = self.work.down, self._left()
        arrived = self.engine.uploads(self.work, asked, lambda some: self._request("masked", some, [down], boxes))
        for client in self.clients:
            if client.index in self.lost:
                yield self.lost[client.index]
            else:
                upload = next(arrived)
                self.down[upload.index] += max(upload.bytes_down - len(down), 0)
                yield replace(upload, bytes_down=min(upload.bytes_down, len(down)))
        yield from arrived

    def reveal(self, asked: bytes, alive: Sequence[int]) -> dict[int, bytes]:
        """The shares of those that are still there."""
        self.lost |= {c.index: _none(c, "") for c in self.clients if c.index not in alive}
        size = shamir.SHARE_BYTES * len(self.members)
        return {i: shares for i, shares in self._stage("reveal", [asked]).items() if len(shares) == size}

    def _left(self) -> list[Client]:
        return [c for c in self.clients if c.index not in self.lost]

    def _stage(self, ask: str, parts: Sequence[bytes] = ()) -> dict[int, bytes]:
        """What the clients say that are left, if there are enough; the others are lost from here on."""
        said: dict[int, bytes] = {}
        if not self._enough(ask):
            return said
        for upload in self.engine.uploads(self.work, self._left(), lambda some: self._request(ask, some, parts, {})):
            if upload.status != "ok":
                log.warning("round %d, %s at %s: %s", self.work.number, upload.client, ask, upload.reason)
            if upload.index < 0:  # what nobody asked for
                continue
            self.up[upload.index] = self.up.get(upload.index, 0) + len(upload.payload)
            self.down[upload.index] = self.down.get(upload.index, 0) + upload.bytes_down
            if upload.status == "ok":
                said[upload.index] = upload.payload
            else:
                reason = f"at the stage of {ask}: {upload.reason}"
                self.lost[upload.index] = replace(upload, bytes_down=0, payload=b"", reason=reason)
        return said

    def _request(
        self, ask: str, clients: Sequence[Client], parts: Sequence[bytes], own: Mapping[int, bytes]
    ) -> tuple[bytes, dict[int, Asked]]:
        """One node's message: `parts` for all, and what each client has of its own."""
        sizes = {c.index: sum(map(len, parts)) + len(own.get(c.index, b"")) for c in clients}
        blob = self.engine.blob(self.work, ask, clients, [*parts, *(own[c.index] for c in clients if own)])
        return blob, {c.index: Asked(c.name, sizes[c.index]) for c in clients}

    def _fits(self, index: int, fits: bool, what: str) -> bool:
        """Lose a client whose message is none."""
        if not fits:
            client = next(c for c in self.clients if c.index == index)
            self.lost[index] = replace(_none(client, f"{what} are not of the length that they have"), status="rejected")
        return fits

    def _enough(self, ask: str) -> bool:
        """Are as many left as must stay? If not, all are lost."""
        left, least = self._left(), threshold_for(len(self.clients))
        if len(left) < least:
            why = f"{len(left)} of {len(self.clients)} clients are left before {ask}, and {least} are needed"
            self.lost |= {c.index: _none(c, why) for c in left}
        return len(left) >= least


def _none(client: Client, why: str) -> Upload:
    return Upload(client.index, client.name, 0, "dropped", 0, reason=why)


def _to(shares: bytes) -> set[int] | None:
    """Whom a client's shares are for; None if they are no shares."""
    try:
        return set(entries(shares))
    except SecureError:
        return None
