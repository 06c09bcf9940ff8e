"""Hostile bytes: only a PayloadError or a valid message comes out, and no memory beyond the schema's size."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprior.codecs import PayloadError, schema_of
from fedprior.codecs.frame import HEADER_BYTES
from wire import CASES, Case, expanded, seal, shrunk, with_body, with_field

cases = pytest.mark.parametrize("case", CASES, ids=str)


def valid_or_refused(case: Case, payload: bytes, message) -> bool:
    """Whether the payload was decoded; anything but a finite message of the schema or a PayloadError fails."""
    schema = schema_of(message)
    try:
        decoded, clients = case.codec.decode(payload, schema)
    except PayloadError as error:
        assert error.reason
        return False
    assert schema_of(decoded) == schema and list(decoded) == list(schema)
    assert all(bool(torch.isfinite(v).all()) for v in decoded.values())
    assert 0 <= clients < float("inf")
    return True


@cases
@settings(max_examples=150)
@given(payload=st.binary(max_size=300))
def test_random_bytes(case: Case, payload: bytes) -> None:
    message = case.message()
    assert not valid_or_refused(case, payload, message)
    valid_or_refused(case, seal(case.codec.encode(message, 1)[:HEADER_BYTES] + payload), message)


@cases
@settings(max_examples=150)
@given(data=st.data())
def test_mutated_frames(case: Case, data: st.DataObject) -> None:
    """Bytes replaced, removed, inserted and repeated; once as they are, once with a checksum that fits."""
    message = case.message()
    original = case.codec.encode(message, 1)
    torn = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(torn) - 1))
        kind = data.draw(st.sampled_from(["replace", "remove", "insert", "repeat"]))
        if kind == "replace":
            torn[at] = data.draw(st.integers(0, 255))
        elif kind == "remove":
            del torn[at : at + data.draw(st.integers(1, 5))]
        elif kind == "insert":
            torn[at:at] = data.draw(st.binary(max_size=5))
        else:
            torn[at:at] = torn[at : at + 8]
        if not torn:
            break
    payload = bytes(torn)
    assert valid_or_refused(case, payload, message) == (payload == original)
    if len(payload) >= HEADER_BYTES:
        valid_or_refused(case, seal(payload), message)


@cases
def test_thousands_of_bodies_reach_the_parser(case: Case) -> None:
    """A plain loop with a sealed frame each: some are accepted, some refused, none does anything else."""
    random_bytes, message = random.Random(0), case.message()
    payload = case.codec.encode(message, 1)
    seen = {True: 0, False: 0}
    for _ in range(1000):
        body = bytearray(expanded(case, payload))
        for _ in range(random_bytes.randint(1, 3)):
            body[random_bytes.randrange(len(body))] = random_bytes.randrange(256)
        if random_bytes.random() < 0.1:
            at = random_bytes.randrange(len(body) // case.itemsize) * case.itemsize
            body[at : at + case.itemsize] = b"\xff" * case.itemsize
        seen[valid_or_refused(case, with_body(payload, shrunk(case, bytes(body))), message)] += 1
    assert seen[True] > 50 and seen[False] > 5


@cases
def test_hostile_headers_allocate_nothing(case: Case) -> None:
    """The peak of a decode stays within a small multiple of the schema's dense size, whatever the bytes claim."""
    message = {"w": torch.randn(200, 200, generator=torch.Generator().manual_seed(0)).to(case.dtype)}
    message["w"][:, :190] = 0
    dense = message["w"].numel() * case.itemsize
    payload = case.codec.encode(message, 1)
    full = case.codec.encode({"w": torch.ones(200, 200, dtype=case.dtype)}, 1)
    hostile = [
        payload,
        full,
        *(with_field(payload, 6, n) for n in (0, 1, 2**31, 2**32 - 1)),
        payload[: HEADER_BYTES + 1],
        with_body(payload, b"\xff" * 51),
        with_body(payload, b"\xff" * (dense // 2)),
        b"\xff" * (10 * dense),
    ]
    schema = schema_of(message)
    for bytes_ in hostile:
        tracemalloc.start()
        try:
            case.codec.decode(bytes_, schema)
        except PayloadError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 3 * dense + 50_000, len(bytes_)
