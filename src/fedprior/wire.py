r"""One client's message, from statistics to bytes and back.

    t      the client's statistics, one client's worth        weight   how often the client counts
    r(t)   what both sides know of them before any data were seen: Algorithm.reference, which is linear in t
    e      what earlier payloads left out: the residual, in units of one client, 0 at first

    client   d = t - r(t) + e           payload = encode(weight d)
             e' = d - decode(payload) / weight
    server   weight t ≈ decode(payload) + r,  r in units of `weight` clients

Without `delta`, r = 0 and d = t; without `feedback`, e = 0. With feedback nothing is lost, only sent late:

    sum over rounds of decode(payload) / weight  =  sum over rounds of (t - r)  -  the last e

Terms that r does not have travel as they are, and have no residual. Both sides compute r from the same decoded eta, so
that in exact arithmetic the server has what it would have had without deltas; in floating point, up to rounding.

Seide et al. 2014 (1-bit SGD, Interspeech); Karimireddy et al. 2019, arXiv:1901.09847.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch

from fedprior import tree
from fedprior.algorithm import Algorithm
from fedprior.codecs import Entropy, PayloadError, Sparse, ValueType, schema_of
from fedprior.core import Eta, Params, Schema, Stats

_LENGTH = struct.Struct("<I")


def encode_eta(algorithm: Algorithm, eta: Eta) -> bytes:
    """The payload of one eta; its index (algorithm.py), if there is one, in a frame of its own after its length."""
    codec, message = algorithm.downlink or algorithm.codec, tree.flatten(eta)
    index = _index(algorithm, message)
    rest = codec.encode({k: v for k, v in message.items() if k not in index}, 0.0)
    first = codec.encode(index, 0.0) if index else b""
    return _LENGTH.pack(len(first)) + first + rest if index else rest


def decode_eta(algorithm: Algorithm, like: Eta, payload: bytes, device: str | torch.device = "cpu") -> Eta:
    """The eta of a payload; a PayloadError for what is no valid one.

    Args:
        algorithm: its codec and prior.
        like: any eta of the same model.
        payload: what arrived.
        device: of the tensors.
    """
    codec, index = algorithm.downlink or algorithm.codec, _index(algorithm, tree.flatten(like))
    message: Params = {}
    if index:
        if len(payload) < _LENGTH.size:
            raise PayloadError(f"{len(payload)} bytes, and the length of the index alone has {_LENGTH.size}")
        end = _LENGTH.size + _LENGTH.unpack_from(payload)[0]
        message, _ = codec.decode(payload[_LENGTH.size : end], schema_of(index))
        like, payload = sized(algorithm, like, message), payload[end:]
    rest = {k: v for k, v in schema_of(tree.flatten(like)).items() if k not in index}
    message = message | codec.decode(payload, rest)[0]
    return tree.unflatten(like, {k: v.to(device) for k, v in message.items()})


def _index(algorithm: Algorithm, message: Params) -> Params:
    fields = getattr(algorithm.prior, "index", ())
    return {k: v for k, v in message.items() if k.split("/", 1)[0] in fields}


def sized(algorithm: Algorithm, like: Eta, message: Params) -> Eta:
    """An eta in the shapes that the index in a flat eta asks for: `like` itself, if shapes stay.

    A PayloadError for the index of another model.
    """
    prior, index = cast(Any, algorithm.prior), _index(algorithm, message)
    if schema_of(index) != schema_of(_index(algorithm, tree.flatten(like))):
        raise PayloadError(f"{', '.join(index) or 'nothing'}: not the index of this model")
    return prior.sized(like, index) if index else like


def message_schema(algorithm: Algorithm, eta: Eta) -> Schema:
    """What the message of a client that was sent eta looks like."""
    return schema_of(flat(algorithm.message(eta, algorithm.inference.start(algorithm.prior, eta))))


def encode(
    algorithm: Algorithm, eta: Eta, stats: Stats, weight: float, residual: Params | None = None
) -> tuple[bytes, Params]:
    """The payload and the next residual; none without feedback.

    Args:
        algorithm: its codec, delta and feedback.
        eta: as the client decoded it.
        stats: one client's message, before its weight.
        weight: how often the client counts.
        residual: the client's last one, flat; None for a new client.
    """
    residual = residual or {}
    message, known = difference(algorithm, eta, stats) if algorithm.delta else (flat(stats), ())
    message |= {k: message[k] + e for k, e in residual.items()}
    payload = algorithm.codec.encode({k: weight * v for k, v in message.items()}, weight)
    if not algorithm.feedback:
        return payload, {}
    try:
        sent, _ = algorithm.codec.decode(payload, schema_of(message))
    except PayloadError:  # the server refuses it as well, and says why; the client's state is not saved then
        return payload, residual
    return payload, {k: message[k] - sent[k].to(message[k].device) / weight for k in known}


def decode(algorithm: Algorithm, eta: Eta, payload: bytes, schema: Schema, device: str | torch.device = "cpu") -> Stats:
    """The statistics of a client that counts `clients` times; a PayloadError for what is no valid payload.

    Args:
        algorithm: its codec and delta.
        eta: as the client decoded it, on `device`; deltas alone ask for it.
        payload: what arrived.
        schema: of every client's message.
        device: of the statistics.
    """
    message, clients = algorithm.codec.decode(payload, schema)
    stats = unflat({k: v.to(device) for k, v in message.items()}, clients)
    return restored(algorithm, eta, stats) if algorithm.delta else stats


def difference(algorithm: Algorithm, eta: Eta, stats: Stats) -> tuple[Params, Collection[str]]:
    """t - r(t), flat, and the names that r has."""
    message, reference = flat(stats), flat(algorithm.reference(eta, stats))
    return message | {k: message[k] - r for k, r in reference.items()}, reference.keys()


def restored(algorithm: Algorithm, eta: Eta, stats: Stats) -> Stats:
    """The inverse of `difference`, of one client or of a sum: r is linear."""
    message, reference = flat(stats), flat(algorithm.reference(eta, stats))
    return unflat(message | {k: message[k] + r for k, r in reference.items()}, stats.clients)


def sparse(value_type: ValueType, entropy: Entropy | Literal["auto"]) -> Sparse:
    """A codec of sparse messages; "auto" is zlib, but not for float32, which hardly compresses."""
    if entropy == "auto":
        entropy = "none" if value_type == "float32" else "zlib"
    return Sparse(value_type, entropy)


def chain(codec: Any, value_type: str) -> dict[str, Any]:
    """The fields of an Algorithm whose messages have this value type.

    Integers are steps of the largest value of a row: the clients send theirs for differences, and the broadcast, for
    which there is nothing to take a difference to, has 8 bits at least.
    """
    down = replace(codec, value_type="int8") if value_type in ("int4", "int2") else None
    return {
        "codec": replace(codec, value_type=value_type),
        "downlink": down,
        "delta": value_type.startswith("int"),
    }


def flat(stats: Stats) -> Params:
    """Statistics as one message: {"term/name": tensor}."""
    return {f"{term}/{name}": v for term, params in stats.terms.items() for name, v in params.items()}


def unflat(message: Params, clients: float) -> Stats:
    """The inverse of `flat`."""
    terms: dict[str, Params] = {}
    for key, value in message.items():
        term, name = key.split("/", 1)
        terms.setdefault(term, {})[name] = value
    return Stats(terms, clients)


def ordered(stats: Stats, schema: Schema) -> Stats:
    """Statistics in the order in which a message is written: those made of a state from disk may have another one."""
    message = flat(stats)
    return unflat({k: message[k] for k in schema}, stats.clients) if message.keys() == schema.keys() else stats


def join(parts: Mapping[str, Params | None]) -> Params:
    """The parts of a client's personal state as one: {"part/key": tensor}; an empty part is none."""
    return {f"{part}/{key}": value for part, params in parts.items() for key, value in (params or {}).items()}


def part(state: Params | None, name: str, device: str | torch.device | None = None) -> Params | None:
    """One part of a personal state, on `device`; None leaves it where it is."""
    prefix = f"{name}/"
    own = {k.removeprefix(prefix): v.to(device) for k, v in (state or {}).items() if k.startswith(prefix)}
    return own or None
