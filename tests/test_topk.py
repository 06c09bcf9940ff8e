"""Top-k: the largest entries over all tensors, positions as short as they can be, and nothing else is accepted."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import equal
from fedprior import Params
from fedprior.codecs import Dense, PayloadError, TopK, schema_of
from fedprior.codecs.frame import HEADER_BYTES
from fedprior.rng import generator
from wire import Case, largest, messages, with_body


def decode(codec, message: Params) -> Params:
    return codec.decode(codec.encode(message, 1), schema_of(message))[0]


@settings(max_examples=200)
@given(data=st.data(), fraction=st.floats(1e-6, 1))
def test_the_largest_entries_arrive_and_no_others(data: st.DataObject, fraction: float) -> None:
    """Against a plain sort over (magnitude, place), ties included; vectors and scalars are whole."""
    message, codec = data.draw(messages(torch.float32)), TopK(fraction)
    kept, decoded = largest(message, fraction), decode(codec, message)
    assert len(codec.encode(message, 1)) == Case(codec).length(message)
    for name, value in message.items():
        want = value if value.ndim < 2 else torch.zeros_like(value)
        for i in kept.get(name, ()):
            want.view(-1)[i] = value.reshape(-1)[i]
        assert torch.equal(decoded[name], want)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.124, 0.126, 0.5, 1.0])
@pytest.mark.parametrize("entropy", ["none", "zlib", "zstd"])
def test_large_messages(fraction: float, entropy: str) -> None:
    """Gaps of one, two and three bytes; all of it shorter than Dense, and the rest of the entries are the smaller."""
    message = {"a": torch.randn(300, 200, generator=generator(0, "a")), "b": torch.zeros(40, 1000)}
    message["b"][:, -1] = 9.0
    codec = TopK(fraction, entropy=entropy)
    decoded = decode(codec, message)
    count, entries = round(fraction * 100_000), torch.cat([v.flatten() for v in message.values()])
    kept = torch.cat([v.flatten() for v in decoded.values()])
    assert torch.equal(kept[kept != 0], entries[kept != 0])
    assert int((kept != 0).sum()) == min(count, int((entries != 0).sum()))
    assert float(entries[kept == 0].abs().max()) <= float(kept[kept != 0].abs().min())
    positions = min(100_000 / 8, 1.6 * count)
    payload = codec.encode(message, 1)
    assert len(payload) <= HEADER_BYTES + 1 + 4 * count + positions + 100
    assert entropy != "none" or len(payload) == Case(codec).length(message)
    assert fraction == 1 or len(payload) < len(Dense().encode(message, 1))


@settings(max_examples=300)
@given(
    data=st.data(), fraction=st.floats(1e-6, 1), kind=st.sampled_from(["float32", "bfloat16", "int8", "int4", "int2"])
)
def test_no_payload_is_longer_than_the_longest(data: st.DataObject, fraction: float, kind: str) -> None:
    """And one of float32 with a bitmap is as long."""
    entropy = data.draw(st.sampled_from(["none", "zlib"]))
    message, codec = data.draw(messages(torch.float32, 2.0**99)), TopK(fraction, kind, entropy)
    payload, longest = codec.encode(message, 1), codec.longest(schema_of(message))
    assert len(payload) <= longest
    entries = sum(v.numel() for v in message.values() if v.ndim >= 2)
    if (kind, entropy) == ("float32", "none") and 8 * max(1, round(fraction * entries)) >= entries:
        assert len(payload) == longest


def test_the_longest_payload_is_nearly_reached() -> None:
    """By gaps of two bytes, of which so many are longer than a bitmap; up to a step, by a byte begun in each tensor."""
    x = torch.zeros(100, 100)
    x.view(-1)[: 50 * 131 : 131] = x.view(-1)[-1170:] = 1.0
    codec, message = TopK(0.122), {"x": x}
    assert len(codec.encode(message, 1)) == codec.longest(schema_of(message))
    codec, message = TopK(1.0, "int2"), {f"x{i}": torch.arange(1.0, 6)[None] for i in range(12)}
    assert 0 <= codec.longest(schema_of(message)) - len(codec.encode(message, 1)) < 12


def test_everything_is_dense() -> None:
    """fraction=1: the values of Dense to the bit, for its bytes, a kind and a bitmap."""
    message = Case(Dense()).message()
    assert equal(decode(TopK(1.0), message), decode(Dense(), message))
    entries = sum(v.numel() for v in message.values() if v.ndim >= 2)
    assert len(TopK(1.0).encode(message, 1)) == len(Dense().encode(message, 1)) + 1 + -(-entries // 8)


def test_the_layout_is_as_documented() -> None:
    """Whole tensors, kind, positions, values: once as gaps, once as a bitmap."""
    message = {"x": torch.zeros(20, 30), "bias": torch.tensor([0.5, 0.0]), "y": torch.zeros(2, 4)}
    message["x"].view(-1)[[7, 207]] = torch.tensor([-3.0, 2.0])
    message["y"][1, 3] = 4.0
    body = TopK(3 / 608).encode(message, 1)[HEADER_BYTES:]
    gaps = bytes([7, 199 & 127 | 128, 199 >> 7, 399 & 127 | 128, 399 >> 7])  # before places 7, 207 and 607
    assert body == struct.pack("<2f", 0.5, 0) + b"\1" + gaps + struct.pack("<3f", -3, 2, 4)
    y = {"y": message["y"] + torch.tensor([1.0, 0, 0, 0])}
    body = TopK(0.3).encode(y, 1)[HEADER_BYTES:]  # 2 of 8, the first of two equal ones
    assert body == b"\0" + bytes([0b1000_0001]) + struct.pack("<2f", 1, 4)


BAD_GAPS = {
    "beyond": (bytes([40, 40, 20]), "beyond the 102 entries"),
    "huge": (bytes([40, 255, 255, 0]), "too long"),
    "ends": (bytes([40, 40, 128]), "ends within positions"),
    "bits": (bytes([0, 128, 128, 128]), "ends within positions"),
    "left over": (bytes([40, 40, 10, 10]), "left over"),
}


def refused(codec, message: Params, body: bytes) -> str:
    with pytest.raises(PayloadError) as error:
        codec.decode(with_body(codec.encode(message, 1), body), schema_of(message))
    return error.value.reason


@pytest.mark.parametrize(("gaps", "reason"), BAD_GAPS.values(), ids=BAD_GAPS)
def test_hostile_gaps_are_refused(gaps: bytes, reason: str) -> None:
    """102 entries, 3 kept, whose gaps may take 3 + 102 // 127 bytes."""
    codec, message = TopK(0.03), {"x": torch.ones(2, 51)}
    values = struct.pack("<3f", 1, 2, 3) if reason != "ends within positions" else b""
    assert reason in refused(codec, message, b"\1" + gaps + values)
    good, _ = codec.decode(
        with_body(codec.encode(message, 1), b"\1" + bytes([40, 40, 19]) + struct.pack("<3f", 1, 2, 3)),
        schema_of(message),
    )
    assert good["x"].flatten().nonzero().flatten().tolist() == [40, 81, 101]


def test_a_number_of_too_many_bits_is_refused() -> None:
    codec, message = TopK(1e-6), {"x": torch.zeros(1000, 2)}
    for length, reason in ((9, "beyond the 2000 entries"), (10, "more than 63 bits")):
        number = b"\xff" * (length - 1) + b"\1"
        assert reason in refused(codec, message, b"\1" + number + struct.pack("<f", 1))


def test_kinds_and_counts_are_checked() -> None:
    codec, message = TopK(0.5), {"x": torch.arange(1.0, 9).view(2, 4)}
    values = struct.pack("<4f", 1, 2, 3, 4)
    assert refused(codec, message, b"\0" + bytes([0b1110_0000]) + values) == "3 positions, expected 4 of 8"
    assert "kind 1 of positions" in refused(codec, message, b"\1\0" + values)  # too many for gaps
    assert "kind 2 of positions" in refused(TopK(0.01), {"x": torch.ones(9, 9)}, b"\2" + values[:4])


def test_infinite_and_undefined_entries_are_among_the_largest() -> None:
    """However few are kept: a training that diverged is not hidden by what is left out."""
    for value in (np.nan, np.inf, -np.inf):
        message = {"x": torch.full((30, 30), 1e30)}
        message["x"][20, 3] = value
        with pytest.raises(PayloadError, match="x are not finite"):
            decode(TopK(1e-6), message)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_fractions_are_checked(fraction: float) -> None:
    with pytest.raises(ValueError, match="0 < fraction <= 1"):
        TopK(fraction)
