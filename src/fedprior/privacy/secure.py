r"""Secure aggregation: the server learns the sum of the clients' vectors and nothing else of them.

    client i          keys     c_i, s_i: X25519 key pairs;  b_i: 32 random bytes
                      shares   of s_i's private key and of b_i (shamir.py), encrypted for client j under (c_i, c_j)
                      masked   y_i = x_i + PRG(b_i) + sum_{j > i} PRG(s_ij) - sum_{j < i} PRG(s_ij)    mod 2^bits
                      reveal   for each client j either its share of b_j (y_j arrived) or of s_j (it did not)
    server            sum of y_i  -  sum of PRG(b_i)  -  the pair masks of clients that did not answer  =  sum of x_i

    s_ij = HKDF(X25519(s_i, s_j));  PRG = AES-256 in counter mode

A round's secrets all derive from 32 secret bytes of the client, by HKDF. Both sides are functions from messages of
bytes to messages of bytes; the server routes what clients say to each other and cannot read it.

    stage      client -> server                              server -> client
    keys       advertise(secret)                             roster(keys): everybody's public keys
    shares     share(state)                                  deliver(sent): the sealed shares of the others
    masked     masked(state, x)                              request(members, alive): who answered, who did not
    reveal     reveal(state, request)                        -

Clients that stop at any stage cost nothing but their own vector while `threshold` are left. Against a server that
follows the protocol but looks at everything, and up to threshold - 1 clients that help it. A client answers one request
a round, and no request for both shares of one client; since 2 threshold > clients, a server that tells
clients different stories cannot have both either, unless 2 threshold - clients of them help it. Who the public
keys belong to is for the transport to prove: a server that makes up clients is not defended against.

Bonawitz et al. 2017, doi:10.1145/3133956.3133982, figure 4 without its signatures.      [extra: privacy]
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from fedprior.privacy import shamir
from fedprior.privacy.masks import (
    COUNTS,
    INDEX,
    KEYS_BYTES,
    SecureError,
    agree,
    derive,
    entries,
    mask,
    noise,
    pair,
    public_key,
    read_request,
    read_roster,
    threshold_for,
)

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("secure aggregation needs cryptography: pip install 'fedprior[privacy]'") from error


@dataclass(frozen=True)
class ClientState:
    """What one client knows in one round.

    Attributes:
        index: its number, which seeds nothing; below 2^32 - 1.
        secret: 32 bytes that nobody else knows and no other round has: os.urandom(32).
        roster: from the server, empty at first.
        inbox: sender -> sealed shares.
        answered: the request that it has answered, if any.
    """

    index: int
    secret: bytes = field(repr=False)
    roster: bytes = field(default=b"", repr=False)
    inbox: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    answered: bytes = b""

    @cached_property
    def keys(self) -> dict[int, bytes]:
        """The roster, read."""
        return read_roster(self.roster)

    @cached_property
    def session(self) -> str:
        """A name for this round that the server cannot reuse with other keys."""
        return hashlib.sha256(self.roster).hexdigest()

    @property
    def threshold(self) -> int:
        """How many clients must stay."""
        return threshold_for(len(self.keys))

    @cached_property
    def members(self) -> list[int]:
        """Whose shares it has, itself included: those whose masks are in its vector."""
        return sorted([*self.inbox, self.index])


def advertise(state: ClientState) -> bytes:
    """The public keys c and s."""
    return b"".join(public_key(derive(state.secret, label)) for label in ("c", "s"))


def enrol(state: ClientState, roster: bytes) -> ClientState:
    """The state that knows the others; a SecureError for a roster that leaves it out or is too short to hide in."""
    state = replace(state, roster=roster)
    if state.keys.get(state.index) != advertise(state):
        raise SecureError(f"the roster does not have the keys of client {state.index}")
    if len(state.keys) < 3:
        raise SecureError(f"a sum of {len(state.keys)} clients hides nothing: 3 are needed")
    return state


def _own_shares(state: ClientState) -> dict[int, bytes]:
    """The shares of s and b for everybody, itself included."""
    points = [index + 1 for index in state.keys]
    size = (state.threshold - 1) * shamir.COEFFICIENT_BYTES
    parts = [
        shamir.split(derive(state.secret, label), points, state.threshold, noise(state.secret, f"split {label}", size))
        for label in ("s", "b")
    ]
    return {index: s + b for index, s, b in zip(state.keys, *parts, strict=True)}


def _seal(state: ClientState, other: int, sender: int, to: int) -> tuple[ChaCha20Poly1305, bytes]:
    """The cipher for the one message from `sender` to `to`: its key is used once."""
    key = agree(derive(state.secret, "c"), state.keys[other][:32], f"share {sender} {to} {state.session}")
    return ChaCha20Poly1305(key), bytes(12)


def share(state: ClientState) -> bytes:
    """The sealed shares for all other clients."""
    parts = []
    for other, shares in _own_shares(state).items():
        if other != state.index:
            cipher, nonce = _seal(state, other, state.index, other)
            parts.append(INDEX.pack(other) + cipher.encrypt(nonce, shares, None))
    return b"".join(parts)


def receive(state: ClientState, delivered: bytes) -> ClientState:
    """The state that holds the others' shares."""
    inbox = entries(delivered)
    if strangers := sorted(inbox.keys() - (state.keys.keys() - {state.index})):
        raise SecureError(f"shares from {strangers}, who are not in the roster")
    if len(inbox) + 1 < state.threshold:
        raise SecureError(f"{len(inbox) + 1} clients are left, and {state.threshold} are needed")
    return replace(state, inbox=inbox)


def masked(state: ClientState, words: np.ndarray) -> np.ndarray:
    """y: the vector (unsigned integers, of which the mask has the width) under all its masks."""
    total = words + mask(derive(state.secret, "b"), len(words), words.dtype)
    private = derive(state.secret, "s")
    for other in state.inbox:
        key = pair(state.index, other, private, state.keys[other][32:], state.session)
        pad = mask(key, len(words), words.dtype)
        total = total + pad if other > state.index else total - pad
    return total


def reveal(state: ClientState, request: bytes) -> tuple[bytes, ClientState]:
    """The share of b of each client that answered and of s of each that did not, in the order of the request."""
    alive, gone = read_request(request)
    if state.answered and state.answered != request:
        raise SecureError("asked twice in one round, for different shares")
    if both := sorted(set(alive) & set(gone)):
        raise SecureError(f"asked for both shares of {both}")
    if sorted([*alive, *gone]) != state.members:
        raise SecureError("the request is not about the clients whose shares were delivered")
    if len(alive) < state.threshold or state.index not in alive:
        raise SecureError(f"{len(alive)} clients answered, and {state.threshold} with this one are needed")
    shares = {sender: _open(state, sender) for sender in state.members}
    parts = [shares[i][shamir.SHARE_BYTES :] for i in alive] + [shares[i][: shamir.SHARE_BYTES] for i in gone]
    return b"".join(parts), replace(state, answered=request)


def _open(state: ClientState, sender: int) -> bytes:
    if sender == state.index:
        return _own_shares(state)[sender]
    cipher, nonce = _seal(state, sender, sender, state.index)
    try:
        return cipher.decrypt(nonce, state.inbox[sender], None)
    except InvalidTag as error:
        raise SecureError(f"the shares from client {sender} were changed on their way") from error


def roster(keys: Mapping[int, bytes]) -> bytes:
    """Everybody's public keys, in the order of the clients."""
    if odd := [index for index, both in keys.items() if len(both) != KEYS_BYTES]:
        raise SecureError(f"the keys of {odd} are not of {KEYS_BYTES} bytes")
    return b"".join(INDEX.pack(index) + keys[index] for index in sorted(keys))


def deliver(roster: bytes, sent: Mapping[int, bytes]) -> dict[int, bytes]:
    """Client -> what the others sent to it; only those that sent shares are members from here on."""
    everybody = read_roster(roster)
    boxes = {sender: entries(message) for sender, message in sent.items()}
    for sender, box in boxes.items():
        if box.keys() != everybody.keys() - {sender}:
            raise SecureError(f"client {sender} did not send one share to each of the others")
    if len(sent) < (least := threshold_for(len(everybody))):
        raise SecureError(f"{len(sent)} clients sent shares, and {least} are needed")
    members = sorted(sent)
    return {
        to: b"".join(INDEX.pack(sender) + boxes[sender][to] for sender in members if sender != to) for to in members
    }


def request(members: Sequence[int], alive: Sequence[int]) -> bytes:
    """What the server asks of those that are alive: two lists, who answered and who did not."""
    gone = sorted(set(members) - set(alive))
    numbers = b"".join(INDEX.pack(index) for index in [*sorted(alive), *gone])
    return COUNTS.pack(len(alive), len(gone)) + numbers


def unmask(roster: bytes, asked: bytes, replies: Mapping[int, bytes], total: np.ndarray) -> np.ndarray:
    """The sum of the vectors, mod 2^bits, from the sum of the masked ones.

    Args:
        roster: of the round.
        asked: the request that was answered.
        replies: client -> its shares.
        total: sum of `masked` over the clients that the request calls alive.

    Raises:
        SecureError: with fewer than the threshold of replies, or shares that do not fit.
    """
    keys, (alive, gone) = read_roster(roster), read_request(asked)
    session, least = hashlib.sha256(roster).hexdigest(), threshold_for(len(keys))
    if len(alive) < least:
        raise SecureError(f"{len(alive)} clients are left, and {least} are needed to unmask")
    if len(replies) < least:
        raise SecureError(f"{len(replies)} of {len(keys)} clients answered, and {least} are needed to unmask")
    size = shamir.SHARE_BYTES
    if odd := [i for i, reply in replies.items() if len(reply) != size * (len(alive) + len(gone)) or i not in alive]:
        raise SecureError(f"the replies of {odd} do not fit the request")
    out = total.copy()
    for place, owner in enumerate([*alive, *gone]):
        shares = {i + 1: reply[place * size : (place + 1) * size] for i, reply in replies.items()}
        try:
            secret = shamir.join(shares, least)
        except ValueError as error:
            raise SecureError(f"client {owner}: {error}") from error
        if place < len(alive):
            out -= mask(secret, len(out), out.dtype)
        else:
            _cancel(out, owner, secret, alive, keys, session)
    return out


def _cancel(
    out: np.ndarray, owner: int, private: bytes, alive: Sequence[int], keys: Mapping[int, bytes], session: str
) -> None:
    """Take from `out` the pair masks of a client whose vector did not arrive: those that the others added."""
    if public_key(private) != keys[owner][32:]:
        raise SecureError(f"client {owner}: the shares do not give its key")
    for other in alive:
        pad = mask(pair(owner, other, private, keys[other][32:], session), len(out), out.dtype)
        if owner > other:
            out -= pad
        else:
            out += pad
