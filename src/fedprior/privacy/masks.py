"""The primitives of secure aggregation (secure.py): keys, masks, and messages that are lists. Extra: privacy."""

from __future__ import annotations

import struct

import numpy as np

from fedprior.privacy import shamir

try:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("secure aggregation needs cryptography: pip install 'fedprior[privacy]'") from error

KEYS_BYTES = 64
_SHARES = 2 * shamir.SHARE_BYTES
_SEALED = _SHARES + 16
INDEX = struct.Struct("<I")
COUNTS = struct.Struct("<II")


class SecureError(ValueError):
    """A message that a client or the server must not act on."""


def threshold_for(clients: int) -> int:
    """The least number that must stay: two thirds, rounded up, and more than a half."""
    return max(clients - clients // 3, clients // 2 + 1)


def derive(secret: bytes, label: str, length: int = 32) -> bytes:
    """HKDF-SHA256 for one purpose."""
    return HKDF(SHA256(), length, None, f"fedprior {label}".encode()).derive(secret)


def noise(secret: bytes, label: str, length: int) -> bytes:
    """Like `derive`, for any length: HKDF ends at 8160 bytes."""
    return _stream(derive(secret, label), length)


def _stream(key: bytes, length: int) -> bytes:
    """PRG(key): each key is used for one vector, so that the counter starts at 0."""
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(length))


def mask(key: bytes, words: int, dtype: np.dtype) -> np.ndarray:
    """PRG(key) as `words` unsigned integers."""
    return np.frombuffer(_stream(key, words * dtype.itemsize), dtype)


def public_key(private: bytes) -> bytes:
    """Of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, label: str) -> bytes:
    """What both ends of X25519 know, for one purpose."""
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SecureError(f"a public key is no key: {error}") from error
    return derive(shared, label)


def pair(i: int, j: int, s_i: bytes, public_j: bytes, session: str) -> bytes:
    """s_ij, the same for both sides."""
    return agree(s_i, public_j, f"pair {min(i, j)} {max(i, j)} {session}")


def read_roster(roster: bytes) -> dict[int, bytes]:
    """Client -> its public keys c and s."""
    size = INDEX.size + KEYS_BYTES
    if len(roster) % size:
        raise SecureError(f"a roster of {len(roster)} bytes is not a whole number of entries")
    entries = [roster[k : k + size] for k in range(0, len(roster), size)]
    keys = {INDEX.unpack_from(entry)[0]: entry[INDEX.size :] for entry in entries}
    if len(keys) < len(entries) or list(keys) != sorted(keys):
        raise SecureError("a roster names each client once, in ascending order")
    if len({public for both in keys.values() for public in (both[:32], both[32:])}) < 2 * len(keys):
        raise SecureError("two public keys of the roster are equal")
    return keys


def entries(message: bytes) -> dict[int, bytes]:
    """Client -> sealed shares."""
    size = INDEX.size + _SEALED
    if len(message) % size:
        raise SecureError(f"{len(message)} bytes of shares are not a whole number of entries")
    cut = [message[k : k + size] for k in range(0, len(message), size)]
    entries = {INDEX.unpack_from(entry)[0]: entry[INDEX.size :] for entry in cut}
    if len(entries) < len(cut):
        raise SecureError("two shares are from or for the same client")
    return entries


def read_request(message: bytes) -> tuple[list[int], list[int]]:
    """The two lists."""
    if len(message) < COUNTS.size:
        raise SecureError("a request has two counts")
    alive, gone = COUNTS.unpack_from(message)
    if len(message) != COUNTS.size + INDEX.size * (alive + gone):
        raise SecureError("a request is not as long as its counts say")
    numbers = [i for (i,) in INDEX.iter_unpack(message[COUNTS.size :])]
    return numbers[:alive], numbers[alive:]
