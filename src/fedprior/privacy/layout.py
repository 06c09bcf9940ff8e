"""Which entries of a message travel under secure aggregation, in what steps: known to both sides before the round.

    words    the entries that eta's cuts leave, in the order of the schema; the weight; the count of unclipped clients

Entries of removed units are not sent, since nobody has them: FedSparse stays small under masks that look random.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedprior.codecs import PayloadError
from fedprior.core import Eta, Params, Prior, Schema
from fedprior.privacy.fixed_point import FixedPoint
from fedprior.privacy.noise import discrete_gaussian
from fedprior.slim import Cut

_HEADER = struct.Struct("<4sIII")
_MAGIC = b"FEDS"


def kept(prior: Prior, eta: Eta, schema: Schema) -> dict[str, np.ndarray]:
    """Name of a message's tensor -> which of its entries are not those of removed units, flat."""
    places = {key: np.ones(shape, bool).ravel() for key, (shape, _) in schema.items()}
    cut = None if getattr(prior, "index", ()) else getattr(prior, "cut", None)  # an eta that shrinks has no such entry
    return places | _left({key: shape for key, (shape, _) in schema.items()}, cut(eta)) if cut else places


def _left(shapes: Mapping[str, tuple[int, ...]], left: Cut) -> dict[str, np.ndarray]:
    """`kept`, for the tensors that one cut is of."""
    names = {key: key.split("/", 1)[1] for key in shapes}
    ones = {name: torch.ones(shapes[key]) for key, name in names.items() if name in left.touched}
    masks = left.scatter(left.gather(ones))
    units = {g.name: torch.ones(g.units) for g in left.groups}
    masks |= left.all_units(left.units(units))
    return {key: masks[name].numpy().ravel() > 0 for key, name in names.items() if name in masks}


@dataclass(frozen=True)
class Field:
    """Entries that share a bound.

    Attributes:
        kept: which of the flat entries travel.
        bound: the largest value of one client, weighted.
        noise: standard deviation of what each client adds, in the unit of the values; 0 for none.
    """

    kept: np.ndarray
    bound: float
    noise: float = 0.0

    @property
    def count(self) -> int:
        """How many entries travel."""
        return int(self.kept.sum())


@dataclass(frozen=True)
class Layout:
    """The vector of one round.

    Attributes:
        schema: of a client's message.
        fields: one for each tensor of the schema, then "weight" and "within".
        fixed: the ring.
        number: of the round; payloads of other rounds are refused.
    """

    schema: Schema
    fields: Mapping[str, Field]
    fixed: FixedPoint
    number: int

    @property
    def words(self) -> int:
        """The length of the vector."""
        return sum(field.count for field in self.fields.values())

    def encode(
        self, message: Params, weight: float, within: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The integers of one client without noise, and the words with it.

        Args:
            message: weighted differences, finite.
            weight: of the client.
            within: what the client adds to the last word; None for 1 if no value is cut off, else 0.
            rng: of the noise.
        """
        values = {k: v.detach().cpu().double().numpy().ravel() for k, v in message.items()}
        values |= {"weight": np.array([weight]), "within": np.array([within])}
        integers, noisy = [], []
        for key, field in self.fields.items():
            steps, _ = self.fixed.integers(values[key][field.kept], field.bound)
            integers.append(steps)
            sigma = field.noise * self.fixed.scale(field.bound)
            noisy.append(steps + discrete_gaussian(sigma, len(steps), rng) if sigma else steps)
        return np.concatenate(integers), self.fixed.words(np.concatenate(noisy))

    def beyond(self, message: Params) -> bool:
        """Is a value larger than its bound? Then it is cut off."""
        return any(bool((v.abs() > self.fields[k].bound).any()) for k, v in message.items())

    def decode(self, words: np.ndarray) -> tuple[Params, float, float]:
        """The sums of messages, of weights and of `within`."""
        ends = np.cumsum([field.count for field in self.fields.values()])[:-1]
        parts = dict(zip(self.fields, np.split(words, ends), strict=True))
        message: Params = {}
        for key, (shape, dtype) in self.schema.items():
            full = np.zeros(len(self.fields[key].kept))
            full[self.fields[key].kept] = self.fixed.values(parts[key], self.fields[key].bound)
            message[key] = torch.from_numpy(full.reshape(shape)).to(dtype)
        weight, within = (self.fixed.values(parts[k], self.fields[k].bound)[0] for k in ("weight", "within"))
        return message, float(weight), float(within)

    @property
    def _digest(self) -> int:
        """Of what both sides must agree on."""
        digest = hashlib.blake2b(f"{self.fixed}{list(self.schema.items())}".encode(), digest_size=4)
        for field in self.fields.values():
            digest.update(np.packbits(field.kept).tobytes() + struct.pack("<d", field.bound))
        return int.from_bytes(digest.digest(), "little")

    def pack(self, words: np.ndarray) -> bytes:
        """A payload: magic, round, digest of the layout, checksum of the words, the words."""
        body = words.tobytes()
        return _HEADER.pack(_MAGIC, self.number, self._digest, zlib.crc32(body)) + body

    def unpack(self, payload: bytes) -> np.ndarray:
        """The words; a PayloadError for anything else."""
        if not payload:
            raise PayloadError("0 bytes: the client kept what it has, as its values are not finite")
        length = _HEADER.size + self.words * self.fixed.dtype.itemsize
        if len(payload) != length:
            raise PayloadError(f"{len(payload)} bytes, and a masked vector of this round has {length}")
        magic, number, digest, crc = _HEADER.unpack_from(payload)
        if (magic, number, digest) != (_MAGIC, self.number, self._digest):
            raise PayloadError(f"not a masked vector of round {self.number} and its layout")
        if crc != zlib.crc32(body := payload[_HEADER.size :]):
            raise PayloadError("checksum differs: the payload was changed on its way")
        return np.frombuffer(body, self.fixed.dtype)
