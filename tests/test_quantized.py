"""Rounded values: within a step, without bias, as long as the formula says; entropy coders expand within bounds."""

from __future__ import annotations

import math
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import equal
from fedprior import Params
from fedprior.codecs import Dense, PayloadError, Sparse, TopK, schema_of
from fedprior.codecs.frame import HEADER_BYTES
from fedprior.rng import generator
from wire import BITS, CASES, EXACT, KINDS, ROUNDED, Case, messages, with_body

MOST = {"int8": 127, "int4": 7, "int2": 1}  # 2^(b-1) - 1
CODECS = [kind(value_type) for kind in KINDS for value_type in MOST]
BY_ROW = [codec for codec in CODECS if not isinstance(codec, TopK)]
codecs, by_row = (
    pytest.mark.parametrize("codec", table, ids=lambda c: f"{type(c).__name__}-{c.value_type}")
    for table in (CODECS, BY_ROW)
)
cases = pytest.mark.parametrize("case", ROUNDED, ids=str)


def steps(codec: Dense | Sparse | TopK, value: Tensor) -> Tensor:
    """max|row| / m, in the shape of the tensor; 2^-22 more than a float32 rounded up. TopK's values are one row."""
    rows = value.double().abs().flatten(1).amax(1) / MOST[codec.value_type]
    rows = rows.amax().expand(len(rows)) if isinstance(codec, TopK) else rows
    return (rows * (1 + 2**-22)).view(-1, *[1] * (value.ndim - 1)).expand(value.shape)


def tolerance(case: Case, value: Tensor) -> Tensor:
    """How far a decoded value may be: nothing, half a bfloat16 digit, or one step and the rounding of the product."""
    shape = (1, value.numel()) if isinstance(case.codec, TopK) else value.shape
    if value.ndim < 2 or value.numel() == 0 or case.size(shape) == 4 * value.numel():
        return torch.zeros(value.shape, dtype=torch.float64)
    tiny = 2.0**-126  # below the normal float32
    if case.codec.value_type == "bfloat16":
        return value.double().abs() * 2**-8 + tiny
    return steps(case.codec, value) + value.double().abs() * 2**-23 + tiny


@cases
@settings(max_examples=60)
@given(data=st.data())
def test_a_value_is_within_one_step(case: Case, data: st.DataObject) -> None:
    """Zeros stay zeros, the length is the formula's, equal messages have equal bytes, the argument is not changed."""
    message = data.draw(messages(torch.float32, largest=2.0**126))
    before = {k: v.clone() for k, v in message.items()}
    payload = case.codec.encode(message, 2.0)
    assert len(payload) == case.length(message) and payload == case.codec.encode(message, 2.0)
    decoded, clients = case.codec.decode(payload, schema_of(message))
    assert clients == 2 and list(decoded) == list(message) and equal(message, before)
    for name, value in message.items():
        error = (decoded[name].double() - value.double()).abs()
        assert (error <= tolerance(case, value)).all()
        assert not decoded[name][value == 0].any()


def decode(codec: Dense | Sparse, message: Params) -> Params:
    return codec.decode(codec.encode(message, 1), schema_of(message))[0]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "values"))


@codecs
@pytest.mark.parametrize("by", ["seed", "message"])
def test_rounding_is_unbiased_and_its_variance_is_that_of_a_coin(codec, by: str) -> None:
    """Mean x and variance s^2 f (1 - f) <= s^2 / 4 of each value, over seeds and over messages that differ elsewhere.

    An error e is in [-s, s] and has a variance of at most s^2 / 4, so its mean over K draws has a standard error of
    at most s / (2 sqrt K). e^2 is in [0, s^2], hence has the same bound in units of s^2.
    """
    value, count = drawn(5, 24), 1500
    step = steps(codec, value)
    total, square = torch.zeros(5, 24, dtype=torch.float64), torch.zeros(5, 24, dtype=torch.float64)
    for k in range(count):
        other = replace(codec, seed=k) if by == "seed" else codec
        error = decode(other, {"x": value, "k": torch.tensor([float(k)])})["x"].double() - value
        total, square = total + error, square + error**2
    fraction = (value / step) % 1
    slack = 4 / (2 * math.sqrt(count))
    assert (total.abs() / count <= slack * step).all()
    assert ((square / count - step**2 * fraction * (1 - fraction)).abs() <= slack * step**2).all()
    assert (square / count <= step**2 * (0.25 + slack)).all()
    z = total / count / (step * (fraction * (1 - fraction) / count).sqrt())
    z = z[(fraction > 0.01) & (fraction < 0.99)]  # all values together: the mean of z^2 is 1 +- 4 sqrt(2 / n)
    assert abs(float((z**2).mean()) - 1) < 4 * math.sqrt(2 / len(z))


@codecs
def test_noise_is_of_the_message(codec) -> None:
    """The last bit of a bias changes the noise of all tensors; equal tensors and rows have noise of their own."""
    message = {"a": drawn(20, 30), "b": drawn(20, 30), "bias": torch.ones(3)}
    changed = message | {"bias": torch.tensor([1.0, 1.0, float(np.nextafter(np.float32(1), np.float32(2)))])}
    first, second = decode(codec, message), decode(codec, changed)
    assert equal(first, decode(codec, message)) and torch.equal(second["bias"], changed["bias"])
    upper, lower = decode(codec, {"x": message["a"].repeat(2, 1)})["x"].chunk(2)
    for one, other in ((first["a"], second["a"]), (first["a"], first["b"]), (upper, lower)):
        assert 0.2 < float((one != other).float().mean()) < 0.6  # 2 f (1 - f) of the values differ, 1/3 on average
    assert not equal(first, decode(replace(codec, seed=1), message))


@by_row
def test_a_step_is_the_least_that_reaches_the_largest_value(codec) -> None:
    """s m >= max|row| exactly, or the largest value would be rounded beyond m; one float32 less is too small."""
    value, most = drawn(2000, 6), MOST[codec.value_type]
    skip = 0 if isinstance(codec, Dense) else 2000 // 8 + 1 + 1  # row bits, column bits, kind
    found = np.frombuffer(codec.encode({"x": value}, 1), "<f4", 2000, HEADER_BYTES + skip)
    largest = value.abs().amax(1).double().numpy()
    assert (found.astype(float) * most >= largest).all()
    assert (np.nextafter(found, np.float32(0)).astype(float) * most < largest).all()


@by_row
def test_no_row_vanishes(codec) -> None:
    value = drawn(50, 9) * 10.0 ** torch.arange(-25, 25).view(-1, 1)
    assert decode(codec, {"x": value})["x"].abs().flatten(1).amax(1).min() > 0
    assert torch.equal(decode(codec, {"x": torch.zeros(4, 5)})["x"], torch.zeros(4, 5))


@cases
def test_vectors_columns_and_constants_are_exact(case: Case) -> None:
    message = {"vector": drawn(50), "scalar": drawn(1)[0]}
    by_row = case.codec.value_type != "bfloat16" and not isinstance(case.codec, TopK)
    message |= {"column": drawn(30, 1)} if by_row else {}
    message |= {"constant": torch.full((6, 7), math.pi)} if isinstance(case.codec, Sparse) else {}
    assert equal(decode(case.codec, message), message)


@cases
def test_float64_messages(case: Case) -> None:
    """Rounded to float32 first, and back in float64."""
    message = {"x": drawn(4, 30).double() / 3, "bias": torch.tensor([1 / 3], dtype=torch.float64)}
    single = {k: v.float() for k, v in message.items()}
    assert equal(decode(case.codec, message), {k: v.double() for k, v in decode(case.codec, single).items()})


BODIES = {  # steps of 1: whole numbers, which no noise moves, by the docstring's layout
    "int8": ([[127.0, -127, 0, 5]], bytes([254, 0, 127, 132])),
    "int4": ([[7.0, -7, 0, 3], [7, 1, 0, 0]], bytes([14 | 0 << 4, 7 | 10 << 4, 14 | 8 << 4, 7 | 7 << 4])),
    "int2": ([[1.0, -1, 0, 1, 1, 0]], bytes([2 | 0 << 2 | 1 << 4 | 2 << 6, 2 | 1 << 2])),
}


@pytest.mark.parametrize("value_type", BODIES)
def test_the_layout_is_as_documented(value_type: str) -> None:
    rows, codes = BODIES[value_type]
    message = {"x": torch.tensor(rows)}
    payload = Dense(value_type).encode(message, 1)
    assert payload[HEADER_BYTES:] == struct.pack("<f", 1.0) * len(rows) + codes
    assert equal(decode(Dense(value_type), message), message)


def test_bfloat16_is_pytorchs() -> None:
    value = drawn(5, 7) * 10.0 ** torch.arange(-42, 35, 2.2)[:35].view(5, 7)
    payload = Dense("bfloat16").encode({"x": value}, 1)
    assert torch.equal(decode(Dense("bfloat16"), {"x": value})["x"], value.bfloat16().float())
    assert payload[HEADER_BYTES:][:35] == bytes(value.bfloat16().view(torch.uint8).flatten()[1::2].tolist())


def test_the_header_tells_value_type_and_entropy() -> None:
    for case in CASES:
        payload = case.codec.encode(case.message(), 1)
        assert payload[6] == 1 + ["float32", "float64", *BITS].index(case.codec.value_type)
        assert payload[7] == ["none", "zlib", "zstd"].index(case.codec.entropy)


def refused(codec, message: Params, body: bytes) -> str:
    with pytest.raises(PayloadError) as error:
        codec.decode(with_body(codec.encode(message, 1), body), schema_of(message))
    return error.value.reason


@pytest.mark.parametrize(("value_type", "invalid"), [("int8", 255), ("int4", 0xF0), ("int4", 0x0F), ("int2", 0xC0)])
def test_steps_and_codes_are_checked(value_type: str, invalid: int) -> None:
    codec, message = Dense(value_type), {"x": torch.ones(1, 9)}
    codes = codec.encode(message, 1)[HEADER_BYTES + 4 :]
    for step in (math.nan, math.inf, -math.inf, -1.0):
        assert refused(codec, message, struct.pack("<f", step) + codes) == "steps of x are not finite, or negative"
    one = struct.pack("<f", 1.0)
    assert refused(codec, message, one + bytes([invalid]) + codes[1:]) == "codes of x are out of range"
    if value_type != "int8":
        tail = bytes([codes[-1] | 0x80])  # beyond the ninth value
        assert refused(codec, message, one + codes[:-1] + tail) == "codes of x are out of range"
    if value_type != "int2":
        assert "x are not finite" in refused(codec, message, struct.pack("<f", 3e38) + codes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@cases
def test_a_value_that_is_not_finite_is_refused(case: Case, value: float) -> None:
    message = {"x": drawn(3, 8)}
    message["x"][1, 2] = value
    with pytest.raises(PayloadError, match="x are not finite"):
        decode(case.codec, message)


SHRINK: dict[str, Callable[[bytes], bytes]] = {"zlib": zlib.compress, "zstd": zstandard.compress}


@pytest.mark.parametrize("entropy", SHRINK)
@pytest.mark.parametrize("value_type", ["float32", *BITS])
@pytest.mark.parametrize("kind", [Dense, Sparse])
def test_an_entropy_coder_changes_the_bytes_alone(kind, value_type: str, entropy: str) -> None:
    """Also where nothing can be shrunk, and where there is nothing at all."""
    big = {"x": drawn(300, 40), "y": torch.eye(500) * 2}
    for message in (big, {"x": drawn(2, 2)}, {"x": torch.zeros(0, 3)}, {}, Case(Dense()).message()):
        plain = kind(value_type).encode(message, 1)
        coded = kind(value_type, entropy).encode(message, 1)
        assert equal(decode(kind(value_type, entropy), message), decode(kind(value_type), message))
        assert len(coded) < len(plain) or message is not big
        with pytest.raises(PayloadError):
            kind(value_type).decode(coded, schema_of(message))


def zstd_frames(size: int) -> list[bytes]:
    """Frames of `size` zeros: with the size, without it, and claiming that it is 1000."""
    honest, silent = zstandard.compress(bytes(size)), zstandard.ZstdCompressor(write_content_size=False)
    assert honest[4] >> 6 == 2  # the size takes 4 bytes, at the end of the header
    at = zstandard.frame_header_size(honest) - 4
    assert struct.unpack_from("<I", honest, at)[0] == size
    return [honest, silent.compress(bytes(size)), honest[:at] + struct.pack("<I", 1000) + honest[at + 4 :]]


@pytest.mark.parametrize("codec", [Dense, Sparse])
def test_a_bomb_is_refused_unexpanded(codec) -> None:
    """50 MB of zeros in a body of 160 kB: refused within a small multiple of what the schema allows."""
    size, message = 50_000_000, {"x": drawn(200, 200)}
    allowed = 4 * message["x"].numel()
    for entropy, body in [("zlib", zlib.compress(bytes(size))), *(("zstd", b) for b in zstd_frames(size))]:
        coder = codec(entropy=entropy)
        payload = with_body(coder.encode(message, 1), body)
        assert len(body) < allowed
        tracemalloc.start()
        try:
            with pytest.raises(PayloadError, match="body"):
                coder.decode(payload, schema_of(message))
            assert tracemalloc.get_traced_memory()[1] < 3 * allowed + 50_000
        finally:
            tracemalloc.stop()


def test_the_window_of_a_zstd_frame_is_bounded() -> None:
    """A cut frame that claims 80 bytes and a window of 128 MB: refused before that much memory is taken."""
    codec, message = Dense(entropy="zstd"), {"x": drawn(4, 5)}
    header = codec.encode(message, 1)[HEADER_BYTES:][:4] + bytes([2 << 6, (27 - 10) << 3]) + struct.pack("<I", 80)
    assert zstandard.get_frame_parameters(header).window_size == 2**27
    assert "memory" in refused(codec, message, header + bytes(3))


@pytest.mark.parametrize("entropy", SHRINK)
def test_malformed_streams_are_refused(entropy: str) -> None:
    codec, message = Dense(entropy=entropy), {"x": drawn(4, 5)}
    good = codec.encode(message, 1)[HEADER_BYTES:]
    longer, shorter = (SHRINK[entropy](bytes(n)) for n in (84, 76))
    for body in (b"", b"\0", bytes(80), good[:-1], good[:5], good + b"\0", good + good[:9], longer, shorter):
        assert "body" in refused(codec, message, body)


def test_names_and_packages_are_checked_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Dense, Sparse):
        with pytest.raises(ValueError, match=r"entropy must be one of none, zlib, zstd, got 'gzip'"):
            kind(entropy="gzip")
        with pytest.raises(ValueError, match=r"value_type must be one of .*int2, got 'int3'"):
            kind("int3")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert Dense(entropy="zlib")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fedprior\[wire\]'"):
        Dense(entropy="zstd")


def test_every_exact_codec_is_deaf_to_the_seed() -> None:
    for case in EXACT:
        assert replace(case.codec, seed=5).encode(case.message(), 1) == case.codec.encode(case.message(), 1)
