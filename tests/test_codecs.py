"""Codecs: what comes out is what went in, and anything else is a PayloadError with a reason."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import equal
from fedprior.codecs import Dense, PayloadError, Sparse, schema_of
from fedprior.codecs.frame import HEADER_BYTES
from wire import CASES, DTYPES, EXACT, HEADER, SHRUNK, Case, messages, same_bits, seal, with_body, with_field

cases = pytest.mark.parametrize("case", CASES, ids=str)
lossless = pytest.mark.parametrize("case", [*EXACT, *SHRUNK], ids=str)


@lossless
@settings(max_examples=80)
@given(data=st.data(), clients=st.floats(0, 1e12))
def test_decode_is_the_inverse_of_encode(case: Case, data: st.DataObject, clients: float) -> None:
    """Bit for bit; Sparse may forget the sign of a zero. The payload is as long as the formula says."""
    message = data.draw(messages(case.dtype))
    payload = case.codec.encode(message, clients)
    assert len(payload) == case.length(message) or case in SHRUNK
    decoded, count = case.codec.decode(payload, schema_of(message))
    assert count == clients and list(decoded) == list(message)
    for name, value in message.items():
        assert decoded[name].dtype == value.dtype and torch.equal(decoded[name], value)
        assert not case.lossless_zero or same_bits(decoded[name], value)


@lossless
def test_an_example_with_every_kind_of_tensor(case: Case) -> None:
    message = case.message()
    before = {k: v.clone() for k, v in message.items()}
    payload = case.codec.encode(message, 3.0)
    assert len(payload) == case.length(message) or case in SHRUNK
    decoded, clients = case.codec.decode(payload, schema_of(message))
    assert clients == 3 and equal(decoded, message) and equal(message, before)
    for value in decoded.values():
        value += 1  # decoded tensors are the receiver's own: writable, and not views of the payload
    assert equal(case.codec.decode(payload, schema_of(message))[0], before)
    if case.codec == Sparse():
        assert len(payload) < len(Dense().encode(message, 3.0))


def test_values_wider_than_the_wire_are_rounded_once() -> None:
    value = {"x": torch.tensor([1 / 3, 1e-300, -2.0], dtype=torch.float64)}
    for codec in (Dense(), Sparse()):
        decoded, _ = codec.decode(codec.encode(value, 1), schema_of(value))
        assert torch.equal(decoded["x"], value["x"].float().double())


def reason(case: Case, payload: bytes, message=None) -> str:
    with pytest.raises(PayloadError) as error:
        case.codec.decode(payload, schema_of(message or case.message()))
    assert error.value.reason and error.value.client is None
    return error.value.reason


@cases
def test_a_payload_cut_at_any_length_is_refused(case: Case) -> None:
    payload = case.codec.encode(case.message(), 1)
    for length in range(len(payload)):
        assert ("header" if length < HEADER_BYTES else "body") in reason(case, payload[:length])
    bare = seal(payload[:HEADER_BYTES])
    for length in range(HEADER_BYTES, len(payload)):  # and with a header that fits the shorter body
        reason(case, with_body(bare, payload[HEADER_BYTES:length]))


@cases
def test_a_changed_byte_anywhere_is_refused(case: Case) -> None:
    payload = case.codec.encode(case.message(), 1)
    for position in range(len(payload)):
        for change in (0x01, 0x80, 0xFF):
            torn = bytearray(payload)
            torn[position] ^= change
            reason(case, bytes(torn))


MAGIC, VERSION, CODEC, VALUE_TYPE, SCHEMA, COUNT, LENGTH = range(7)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        (MAGIC, b"PDEF", "starts with"),
        (VERSION, 2, "version"),
        (CODEC, 9, "codec"),
        (VALUE_TYPE, 7, "value type"),
        (SCHEMA, b"\0" * 8, "another schema"),
        (COUNT, float("nan"), "count of clients"),
        (COUNT, float("inf"), "count of clients"),
        (COUNT, -1.0, "count of clients"),
        (LENGTH, 0, "header says 0"),
        (LENGTH, 2**32 - 1, "header says 4294967295"),
    ],
)
@cases
def test_a_wrong_header_is_refused_with_its_reason(case: Case, field: int, value: object, expected: str) -> None:
    assert expected in reason(case, with_field(case.codec.encode(case.message(), 1), field, value))


@cases
def test_messages_for_another_schema_codec_or_type_are_refused(case: Case) -> None:
    message = case.message()
    payload = case.codec.encode(message, 1)
    others = {
        "name": {("other" if k == "mask" else k): v for k, v in message.items()},
        "order": dict(reversed(message.items())),
        "shape": message | {"mask": message["mask"].view(3, 1)},
    }
    for other in others.values():
        assert "schema" in reason(case, payload, other)
    for other in CASES:
        if other != case:
            text = reason(other, payload, message)  # a longer payload than any of the other codec is refused unread
            assert "(version, codec, value type)" in text or "fit this schema" in text


@cases
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["scalar", "vector", "matrix", "mask"])
def test_a_value_that_is_not_finite_is_refused_by_name(case: Case, name: str, value: float) -> None:
    message = case.message()
    message[name].view(-1)[-1] = value
    text = reason(case, case.codec.encode(message, 1))
    assert "not finite" in text and name in text


@pytest.mark.parametrize("codec", [Dense("float64"), Sparse("float64")], ids=repr)
def test_a_value_too_large_for_the_receivers_type_is_refused(codec) -> None:
    """Finite in float64 on the wire, infinite in the float32 that the schema asks for."""
    message = {"x": torch.ones(2, 3)}
    huge = {"x": torch.full((2, 3), 1e300, dtype=torch.float64)}
    payload = codec.encode(message, 1)
    body = codec.encode(huge, 1)[HEADER_BYTES:]
    with pytest.raises(PayloadError, match="x are not finite"):
        codec.decode(with_body(payload, body), schema_of(message))


@pytest.mark.parametrize("codec", [Dense(), Sparse()], ids=repr)
def test_finite_values_whose_sum_overflows_are_taken(codec) -> None:
    message = {"x": torch.full((2, 3), 3e38)}
    assert message["x"].sum().isinf()
    assert torch.equal(codec.decode(codec.encode(message, 1), schema_of(message))[0]["x"], message["x"])


@pytest.mark.parametrize("codec", [Dense(), Sparse()], ids=repr)
def test_an_overflow_of_the_wire_type_is_refused(codec) -> None:
    message = {"x": torch.full((2,), 1e300, dtype=torch.float64)}
    with pytest.raises(PayloadError, match="2 of 2 values of x are not finite"):
        codec.decode(codec.encode(message, 1), schema_of(message))


@cases
def test_trailing_and_missing_bytes_are_refused(case: Case) -> None:
    payload = case.codec.encode(case.message(), 1)
    for extra in (b"\0", b"\0" * 7, b"x" * 1000):
        reason(case, payload + extra)
        reason(case, seal(payload + extra))
    reason(case, b"")
    assert "fit this schema" in reason(case, b"F" * 100_000)


def test_sparse_masks_and_kinds_are_checked() -> None:
    """Bits beyond the units, an unknown kind, and a mask that promises more values than there are."""
    case, message = CASES[2], {"x": torch.tensor([1.0, 2.0, 0.0])}
    payload = case.codec.encode(message, 1)
    assert payload[HEADER_BYTES] == 0b1100_0000 and payload[HEADER_BYTES + 1] == 0

    def told(mask: int, kind: int, values: int) -> str:
        return reason(case, with_body(payload, bytes([mask, kind]) + b"\0\0\x80\x3f" * values), message)

    assert "beyond its 3 units" in told(0b1101_0000, 0, 2)
    assert "kind 2" in told(0b1100_0000, 2, 2)
    assert "ends within x" in told(0b1110_0000, 0, 2)
    assert "left over" in told(0b1000_0000, 0, 2)
    assert "left over" in told(0b1110_0000, 1, 2)
    decoded, _ = case.codec.decode(with_body(payload, bytes([0b1010_0000, 1]) + b"\0\0\x80\x3f"), schema_of(message))
    assert decoded["x"].tolist() == [1, 0, 1]


def test_value_types_are_checked_at_construction() -> None:
    for codec in (Dense, Sparse):
        with pytest.raises(ValueError, match="float16"):
            codec("float16")


def test_the_header_is_as_documented() -> None:
    """32 bytes, little-endian; the codec's number and the count at the documented offsets."""
    for case, number in zip(EXACT, (1, 1, 2, 2, 3), strict=True):
        payload = case.codec.encode({"x": torch.ones(2, dtype=case.dtype)}, 17.5)
        assert HEADER_BYTES == 32 == HEADER.size + 4
        assert payload[:4] == b"FEDP" and payload[4] == 1 and payload[5] == number
        assert struct.unpack_from("<H", payload, 6)[0] == 1 + list(DTYPES).index(case.codec.value_type)
        assert struct.unpack_from("<d", payload, 16)[0] == 17.5
        assert struct.unpack_from("<I", payload, 24)[0] == len(payload) - 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_travel(dtype: torch.dtype) -> None:
    """Exactly: both are subsets of float32."""
    message = {"x": torch.linspace(-3, 3, 12, dtype=torch.float64).to(dtype).reshape(3, 4)}
    for codec in (Dense(), Sparse()):
        decoded, _ = codec.decode(codec.encode(message, 1), schema_of(message))
        assert decoded["x"].dtype == dtype and torch.equal(decoded["x"], message["x"])
