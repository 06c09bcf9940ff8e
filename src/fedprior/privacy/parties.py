"""Who speaks for the clients of a round under secure aggregation (sealed.py): a simulation, or a federation's nodes.

The run's seed stands for the simulated clients' randomness, so that a run can be repeated; in a federation a client's
32 secret bytes are os.urandom(32), and nobody else has them (federation/secure.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from fedprior.privacy import secure
from fedprior.privacy.secure import ClientState


class Secrets(Protocol):
    """The clients' side: what masks an upload."""

    def state(self, index: int) -> ClientState:
        """Of one client, once it has the others' shares; a SecureError for a client that is not in the round."""
        ...


class Parties(Protocol):
    """The server's side, after keys and shares.

    Attributes:
        roster: everybody's public keys.
        members: the clients that sent shares, in ascending order.
        up, down: bytes of the protocol's messages by client, without the masked vectors.
    """

    roster: bytes
    members: Sequence[int]
    up: dict[int, int]
    down: dict[int, int]

    def reveal(self, asked: bytes, alive: Sequence[int]) -> dict[int, bytes]:
        """The shares of those clients in `alive` that answer `asked`."""
        ...


@dataclass
class Simulated:
    """Both sides of one round; keys and shares are made when they are first asked for.

    Attributes:
        seed, number: of the clients' randomness.
        ids: of the cohort.
        known: the roster, in a process that only masks.
    """

    seed: int
    number: int
    ids: Sequence[int]
    known: bytes = b""

    @cached_property
    def _agreed(self) -> tuple[dict[int, ClientState], dict[int, int], dict[int, int]]:
        """What each client knows after the shares, and the bytes of keys and shares."""
        states = {i: ClientState(i, _secret(self.seed, self.number, i)) for i in self.ids}
        keys = {i: secure.advertise(state) for i, state in states.items()}
        roster = secure.roster(keys)
        states = {i: secure.enrol(state, roster) for i, state in states.items()}
        sent = {i: secure.share(state) for i, state in states.items()}
        boxes = secure.deliver(roster, sent)
        up = {i: len(keys[i]) + len(sent[i]) for i in states}
        down = {i: len(roster) + len(boxes[i]) for i in states}
        return {i: secure.receive(states[i], box) for i, box in boxes.items()}, up, down

    @property
    def states(self) -> dict[int, ClientState]:
        """What each client knows after the shares."""
        return self._agreed[0]

    @property
    def up(self) -> dict[int, int]:
        """Bytes of each client's messages."""
        return self._agreed[1]

    @property
    def down(self) -> dict[int, int]:
        """Bytes of the messages to each client."""
        return self._agreed[2]

    @property
    def roster(self) -> bytes:
        """Everybody's public keys."""
        return self.known or self.states[self.members[0]].roster

    @property
    def members(self) -> list[int]:
        """All: nobody drops out before the masked vectors."""
        return sorted(self.ids)

    def public(self) -> Simulated:
        """For a process that only masks: it derives a client's state again, without the others' shares."""
        return Simulated(self.seed, self.number, self.ids, self.roster)

    def state(self, index: int) -> ClientState:
        """A client's own; it is masked with all others, and what their shares say does not matter to the masks."""
        if not self.known:
            return self.states[index]
        inbox = {i: b"" for i in self.ids if i != index}
        return ClientState(index, _secret(self.seed, self.number, index), self.known, inbox)

    def reveal(self, asked: bytes, alive: Sequence[int]) -> dict[int, bytes]:
        """The shares of all that are alive."""
        replies = {i: secure.reveal(self.states[i], asked)[0] for i in alive}
        for i, reply in replies.items():
            self.up[i] += len(reply)
            self.down[i] += len(asked)
        return replies


def _secret(seed: int, number: int, index: int) -> bytes:
    """A simulated client's 32 bytes."""
    return hashlib.blake2b(f"secure\0{seed}\0{number}\0{index}".encode(), digest_size=32).digest()
