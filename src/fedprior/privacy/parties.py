"""Who speaks for the clients of a round under secure aggregation (sealed.py): a simulation, or a federation's nodes.

The run's seed stands for the simulated clients' randomness, so that a run can be repeated; in a federation a client's
32 secret bytes are os.urandom(32), and nobody else has them (federation/secure.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from fedprior.privacy import secure
from fedprior.privacy.masks import threshold_for
from fedprior.privacy.secure import ClientState
from fedprior.rng import noise_generator


class Secrets(Protocol):
    """The clients' side: what masks an upload."""

    def state(self, index: int) -> ClientState:
        """Of one client, once it has the others' shares; a SecureError for a client that is not in the round."""
        ...

    def noise(self, index: int) -> np.random.Generator:
        """What one client draws the noise of its vector from."""
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


class Agreed(NamedTuple):
    """After keys and shares.

    Attributes:
        states: what each client knows; empty in a process that only masks.
        roster, members: as in Parties; members are none if too few are left.
        lost: who is not a member, and why.
        up, down: bytes of keys and shares, by client.
    """

    states: Mapping[int, ClientState]
    roster: bytes
    members: Sequence[int]
    lost: Mapping[int, str]
    up: dict[int, int]
    down: dict[int, int]


@dataclass
class Simulated:
    """Both sides of one round; keys and shares are made when they are first asked for.

    Attributes:
        seed, number: of the clients' randomness.
        stages: client of the cohort -> the message that it does not send any more: "keys", "shares", "masked",
            "reveal", or "" for none.
        known: what was agreed, in a process that only masks.
    """

    seed: int
    number: int
    stages: Mapping[int, str]
    known: Agreed | None = None

    @cached_property
    def agreed(self) -> Agreed:
        """Keys and shares, as long as two thirds of the cohort are there, and three."""
        if self.known is not None:
            return self.known
        least = max(3, threshold_for(len(self.stages)))
        states = {i: ClientState(i, _secret(self.seed, self.number, i)) for i in self._speaking(self.stages, "keys")}
        keys = {i: secure.advertise(state) for i, state in states.items()}
        roster = secure.roster(keys)
        sent: dict[int, bytes] = {}
        if len(keys) >= least:
            states = {i: secure.enrol(state, roster) for i, state in states.items()}
            sent = {i: secure.share(states[i]) for i in self._speaking(states, "shares")}
        boxes = secure.deliver(roster, sent) if len(sent) >= least else {}
        short = f"{len(sent) or len(keys)} of {len(self.stages)} clients are left, and {least} are needed"
        why = {"keys": "it sent no keys", "shares": "it sent no shares"}
        lost = {i: why.get(stage, short) for i, stage in self.stages.items() if i not in boxes}
        up = {i: len(key) + len(sent.get(i, b"")) for i, key in keys.items()}
        heard = roster if len(keys) >= least else b""
        down = {i: len(heard) + len(boxes.get(i, b"")) for i in keys}
        return Agreed({i: secure.receive(states[i], boxes[i]) for i in boxes}, roster, sorted(boxes), lost, up, down)

    def _speaking(self, clients: Iterable[int], stage: str) -> list[int]:
        return [i for i in clients if self.stages[i] != stage]

    @property
    def roster(self) -> bytes:
        """Everybody's public keys."""
        return self.agreed.roster

    @property
    def members(self) -> Sequence[int]:
        """Those that sent shares."""
        return self.agreed.members

    @property
    def lost(self) -> Mapping[int, str]:
        """Those that did not, or everybody if too few did, and why."""
        return self.agreed.lost

    @property
    def up(self) -> dict[int, int]:
        """Bytes of each client's messages."""
        return self.agreed.up

    @property
    def down(self) -> dict[int, int]:
        """Bytes of the messages to each client."""
        return self.agreed.down

    def public(self) -> Simulated:
        """For a process that only masks: it derives a client's state again, without the others' shares."""
        return Simulated(self.seed, self.number, self.stages, self.agreed._replace(states={}))

    def state(self, index: int) -> ClientState:
        """A client's own; it is masked with all members, and what their shares say does not matter to the masks."""
        if self.known is None:
            return self.agreed.states[index]
        inbox = {i: b"" for i in self.members if i != index}
        return ClientState(index, _secret(self.seed, self.number, index), self.roster, inbox)

    def noise(self, index: int) -> np.random.Generator:
        """From the run's seed."""
        return noise_generator(self.seed, self.number, index, "noise")

    def reveal(self, asked: bytes, alive: Sequence[int]) -> dict[int, bytes]:
        """The shares of those that are still there."""
        states = self.agreed.states
        replies = {i: secure.reveal(states[i], asked)[0] for i in self._speaking(alive, "reveal")}
        for i in alive:
            self.up[i] += len(replies.get(i, b""))
            self.down[i] += len(asked)
        return replies


def _secret(seed: int, number: int, index: int) -> bytes:
    """A simulated client's 32 bytes."""
    return hashlib.blake2b(f"secure\0{seed}\0{number}\0{index}".encode(), digest_size=32).digest()
