"""Mutated messages of a secure sum: each is read as what it can be, or refused; nothing else is raised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from draws import torn
from fedprior.codecs import PayloadError
from fedprior.privacy import masks, secure
from fedprior.privacy.fixed_point import FixedPoint
from fedprior.privacy.layout import Field, Layout
from fedprior.privacy.masks import SecureError
from fedprior.privacy.secure import ClientState
from fedprior.rng import numpy_generator

IDS = [1, 4, 7, 9, 12]
STATES = {i: ClientState(i, numpy_generator(0, "secret", i).bytes(32)) for i in IDS}
ROSTER = secure.roster({i: secure.advertise(state) for i, state in STATES.items()})
KNOWN = {i: secure.enrol(state, ROSTER) for i, state in STATES.items()}
BOXES = secure.deliver(ROSTER, {i: secure.share(state) for i, state in KNOWN.items()})
READY = {i: secure.receive(state, BOXES[i]) for i, state in KNOWN.items()}
REQUEST = secure.request(IDS, IDS[:4])
LAYOUT = Layout({}, {"weight": Field(np.ones(9, bool), 1.0)}, FixedPoint(32, 5), 3)
VECTOR = LAYOUT.pack(np.arange(9, dtype="<u4"))

READERS: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    "keys": (ROSTER[4:68], lambda data: secure.roster({1: data})),
    "roster": (ROSTER, masks.read_roster),
    "shares": (secure.share(KNOWN[1]), masks.entries),
    "box": (BOXES[1], lambda data: secure.receive(KNOWN[1], data)),
    "request": (REQUEST, lambda data: secure.reveal(READY[1], data)),
    "vector": (VECTOR, LAYOUT.unpack),
}


def mutated(data: bytes, name: str, k: int) -> bytes:
    """One to three bytes changed; in one of five also cut, in another one of five longer."""
    rng = numpy_generator(0, name, k)
    return torn(data, rng, k % 5 == 0) + rng.bytes(int(rng.integers(1, 90))) * (k % 5 == 1)


@pytest.mark.parametrize("count", [500, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_mutated_messages_are_read_or_refused(name: str, count: int) -> None:
    good, read = READERS[name]
    read(good)
    refused = 0
    for k in range(count // len(READERS) + 1):
        try:
            read(mutated(good, name, k))
        except (SecureError, PayloadError) as error:
            refused += 1
            assert str(error)
    assert refused


def test_no_mutated_vector_is_taken_for_one() -> None:
    """Every byte of it is under its header, or its checksum."""
    for place in range(len(VECTOR)):
        other = bytearray(VECTOR)
        other[place] ^= 1
        with pytest.raises(PayloadError):
            LAYOUT.unpack(bytes(other))


OTHERS = {
    "round": replace(LAYOUT, number=4),
    "cohort": replace(LAYOUT, fixed=FixedPoint(32, 6)),
    "bound": replace(LAYOUT, fields={"weight": Field(np.ones(9, bool), 2.0)}),
    "entries": replace(LAYOUT, fields={"weight": Field(np.arange(10) != 4, 1.0)}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_vector_of_another_layout_is_refused(other: str) -> None:
    """Its words would stand for other values, or for other entries."""
    with pytest.raises(PayloadError, match="not a masked vector of round"):
        OTHERS[other].unpack(VECTOR)


def test_no_request_but_the_true_one_is_answered_twice() -> None:
    """Whoever has answered answers nothing else; an answer to a mutated request is about the same clients."""
    _, answered = secure.reveal(READY[1], REQUEST)
    for k in range(200):
        other = mutated(REQUEST, "request", k)
        if other != REQUEST:
            with pytest.raises(SecureError):
                secure.reveal(answered, other)
