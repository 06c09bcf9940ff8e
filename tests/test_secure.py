"""Secure aggregation: the unmasked sum is the plain one whoever drops out, and nobody learns more than that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2

from fedprior.privacy import masks, secure, shamir
from fedprior.privacy.fixed_point import WIDTHS, FixedPoint
from fedprior.privacy.masks import SecureError, threshold_for
from fedprior.privacy.secure import ClientState
from fedprior.rng import numpy_generator

WORDS = 50


def secret(*names: int | str) -> bytes:
    return numpy_generator(0, "secret", *names).bytes(32)


def vectors(clients: int, bits: int = 32, words: int = WORDS) -> dict[int, np.ndarray]:
    rng = numpy_generator(0, "vectors", clients, bits)
    return {3 * i + 1: rng.integers(0, 2**bits, words, dtype=np.uint64).astype(WIDTHS[bits]) for i in range(clients)}


class Round:
    """The four stages in plain loops; who is named in `gone` stops before its message of that stage."""

    def __init__(self, inputs: dict[int, np.ndarray], gone: dict[str, Collection[int]] | None = None) -> None:
        self.inputs, self.gone = inputs, gone or {}
        states = {i: ClientState(i, secret(i)) for i in inputs}
        keys = {i: secure.advertise(s) for i, s in states.items() if i not in self.gone.get("keys", ())}
        self.roster = secure.roster(keys)
        states = {i: secure.enrol(states[i], self.roster) for i in keys}
        sent = {i: secure.share(s) for i, s in states.items() if i not in self.gone.get("shares", ())}
        self.states = {i: secure.receive(states[i], box) for i, box in secure.deliver(self.roster, sent).items()}
        self.masked = {
            i: secure.masked(s, inputs[i]) for i, s in self.states.items() if i not in self.gone.get("masked", ())
        }
        self.request = secure.request(list(self.states), list(self.masked))

    def replies(self) -> dict[int, bytes]:
        answering = [i for i in self.masked if i not in self.gone.get("reveal", ())]
        return {i: secure.reveal(self.states[i], self.request)[0] for i in answering}

    def unmask(self, replies: dict[int, bytes] | None = None) -> np.ndarray:
        return secure.unmask(self.roster, self.request, self.replies() if replies is None else replies, self.summed())

    def summed(self) -> np.ndarray:
        return functools.reduce(np.add, self.masked.values())


STAGES = ("keys", "shares", "masked", "reveal")


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("stage", [None, *STAGES])
@pytest.mark.parametrize("clients", [3, 4, 7, 10])
def test_the_sum_is_the_plain_one_with_a_third_gone(clients: int, stage: str | None, bits: int) -> None:
    inputs = vectors(clients, bits)
    lost = list(inputs)[1 : 1 + clients // 3] if stage and not (stage == "keys" and clients < 6) else []
    played = Round(inputs, {stage: lost} if stage else None)
    counted = inputs if stage == "reveal" else {i: x for i, x in inputs.items() if i not in lost}
    plain = [sum(int(x[k]) for x in counted.values()) % 2**bits for k in range(WORDS)]
    assert played.unmask().tolist() == plain


def test_clients_that_drop_at_every_stage_together() -> None:
    inputs = vectors(13)
    ids = list(inputs)
    played = Round(inputs, {"keys": ids[:1], "shares": ids[1:2], "masked": ids[2:4], "reveal": ids[4:5]})
    assert played.unmask().tolist() == functools.reduce(np.add, [inputs[i] for i in ids[4:]]).tolist()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_below_the_threshold_nothing_is_unmasked(stage: str) -> None:
    inputs = vectors(7)
    lost = list(inputs)[: 7 - threshold_for(7) + 1]
    with pytest.raises(SecureError, match=rf"{7 - len(lost)} .*{threshold_for(7)} .*needed"):
        Round(inputs, {stage: lost}).unmask()


@pytest.mark.parametrize("clients", range(3, 60))
def test_the_threshold_leaves_room_for_a_third_and_is_more_than_a_half(clients: int) -> None:
    least = threshold_for(clients)
    assert clients - clients // 3 == least or clients < 3
    assert 2 * least > clients


def test_masked_bytes_look_uniform() -> None:
    """Chi-squared over the 256 values of a byte; the inputs are all zeros, so what is seen is the masks."""
    played = Round({i: np.zeros(20_000, "<u4") for i in range(5)})
    seen = [*played.masked.values(), played.masked[0] + played.masked[1]]
    for words in seen:
        counts = np.bincount(np.frombuffer(words.tobytes(), "u1"), minlength=256)
        expected = counts.sum() / 256
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert chi2.ppf(1e-4, 255) < statistic < chi2.ppf(1 - 1e-4, 255)
    flat = np.stack(list(played.masked.values())).astype(np.float64)
    off = np.corrcoef(flat) - np.eye(5)
    assert np.abs(off).max() < 5 / np.sqrt(flat.shape[1])  # five standard deviations of a correlation


def test_one_client_of_the_rest_hides_another() -> None:
    """All masks but one pair's known: the two vectors of that pair are still under a mask of their own."""
    inputs = {i: np.zeros(1000, "<u4") for i in range(3)}
    played = Round(inputs)
    keys = played.states[0].keys
    left = played.masked[0] - masks.mask(masks.derive(secret(0), "b"), 1000, np.dtype("<u4"))
    known = masks.pair(0, 2, masks.derive(secret(2), "s"), keys[0][32:], played.states[0].session)
    left = left - masks.mask(known, 1000, np.dtype("<u4"))  # with client 2's help
    assert np.count_nonzero(left == 0) < 5


def test_a_round_of_other_secrets_has_other_masks() -> None:
    same, other = ClientState(1, secret("a")), ClientState(1, secret("b"))
    assert secure.advertise(same) == secure.advertise(ClientState(1, secret("a"))) != secure.advertise(other)


def forged(played: Round, alive: list[int], gone: list[int]) -> bytes:
    parts = [masks.INDEX.pack(i) for i in [*alive, *gone]]
    return masks.COUNTS.pack(len(alive), len(gone)) + b"".join(parts)


def test_clients_refuse_what_would_give_them_away() -> None:
    inputs = vectors(7)
    played, ids = Round(inputs, {"masked": [19]}), list(inputs)
    state = played.states[1]
    bad = {
        "both shares": forged(played, ids, [19]),
        "not about": forged(played, ids[:-2], [19]),
        "4 clients answered": forged(played, ids[:4], ids[4:]),
        "1 clients answered": forged(played, [1], ids[1:]),
        "as long as": played.request[:-1],
        "two counts": b"",
    }
    for reason, request in bad.items():
        with pytest.raises(SecureError, match=reason):
            secure.reveal(state, request)
    with pytest.raises(SecureError, match="with this one are needed"):
        secure.reveal(played.states[1], forged(played, ids[1:], [1]))
    reply, answered = secure.reveal(state, played.request)
    assert secure.reveal(answered, played.request)[0] == reply
    with pytest.raises(SecureError, match="asked twice"):
        secure.reveal(answered, forged(played, ids, []))


def enrolling(change: Callable[[dict[int, bytes]], dict[int, bytes]]) -> ClientState:
    keys = {i: secure.advertise(ClientState(i, secret(i))) for i in range(4)}
    return secure.enrol(ClientState(0, secret(0)), secure.roster(change(keys)))


BAD_ROSTERS = {
    "does not have the keys": lambda keys: {i: k for i, k in keys.items() if i},
    "the keys of client 0": lambda keys: keys | {0: secure.advertise(ClientState(0, secret("another")))},
    "hides nothing": lambda keys: {0: keys[0], 1: keys[1]},
    "are equal": lambda keys: keys | {3: keys[2]},
    "not of 64 bytes": lambda keys: keys | {2: b"short"},
}


@pytest.mark.parametrize("reason", BAD_ROSTERS)
def test_rosters_that_are_refused(reason: str) -> None:
    with pytest.raises(SecureError, match=reason):
        enrolling(BAD_ROSTERS[reason])


def test_shares_that_were_changed_are_noticed() -> None:
    played = Round(vectors(4))
    state = played.states[1]
    sender = next(iter(state.inbox))
    sealed = state.inbox[sender]
    spoiled = replace(state, inbox={**state.inbox, sender: bytes([sealed[0] ^ 1]) + sealed[1:]})
    with pytest.raises(SecureError, match=f"client {sender} were changed"):
        secure.reveal(spoiled, played.request)


def test_a_wrong_key_share_is_noticed() -> None:
    played = Round(vectors(7), {"masked": [4]})
    replies = played.replies()
    first = next(iter(replies))
    replies[first] = replies[first][:-1] + bytes([replies[first][-1] ^ 1])
    with pytest.raises(SecureError, match="client 4"):
        played.unmask(replies)
    with pytest.raises(SecureError, match=r"replies of \[1\] do not fit"):
        played.unmask(replies | {1: b"x"})


def test_messages_are_as_long_as_they_say() -> None:
    clients = 6
    played = Round(vectors(clients))
    state = played.states[1]
    assert len(secure.advertise(state)) == masks.KEYS_BYTES
    assert len(played.roster) == clients * (4 + 64)
    assert len(secure.share(state)) == (clients - 1) * (4 + 2 * 33 + 16)
    assert len(played.replies()[1]) == clients * 33


@pytest.mark.parametrize(("points", "threshold"), [(3, 2), (5, 5), (9, 4), (4, 1)])
def test_any_threshold_of_shares_gives_the_secret(points: int, threshold: int) -> None:
    rng = numpy_generator(0, "shamir", points)
    value = rng.bytes(32)
    shares = shamir.split(value, range(1, points + 1), threshold, rng.bytes(48 * (threshold - 1)))
    for _ in range(5):
        chosen = rng.permutation(points)
        some = {int(i) + 1: shares[i] for i in chosen[:threshold]}
        assert shamir.join(some, threshold) == value
        with pytest.raises(ValueError, match="are needed"):
            shamir.join({x: some[x] for x in list(some)[1:]}, threshold)


def test_fewer_shares_fit_any_secret() -> None:
    """With t - 1 shares fixed, there is one polynomial for every secret: one more point is solved for, and it fits."""
    rng = numpy_generator(0, "shamir")
    shares = shamir.split(rng.bytes(32), [1, 2, 3], 3, rng.bytes(96))
    other = rng.bytes(32)
    points = {0: int.from_bytes(other, "big"), 1: int.from_bytes(shares[0], "big"), 2: int.from_bytes(shares[1], "big")}
    third = 0
    for x, y in points.items():
        top = bottom = 1
        for z in points.keys() - {x}:
            top, bottom = top * (3 - z), bottom * (x - z)
        third += y * top * pow(bottom, -1, shamir.PRIME)
    forged = {1: shares[0], 2: shares[1], 3: (third % shamir.PRIME).to_bytes(33, "big")}
    assert shamir.join(forged, 3) == other


def test_the_modulus_is_prime() -> None:
    """Miller-Rabin with 40 bases: composite with probability below 4^-40."""
    n = shamir.PRIME
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    rng = numpy_generator(0, "prime")
    for _ in range(40):
        x = pow(int.from_bytes(rng.bytes(32), "big") % (n - 3) + 2, odd, n)
        assert x in (1, n - 1) or any((x := x * x % n) == n - 1 for _ in range(twos - 1))
    with pytest.raises(ValueError, match="threshold"):
        shamir.split(bytes(32), [1, 1], 1, b"")


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("bound", [1e-3, 0.7, 1.0, 300.0])
@pytest.mark.parametrize("clients", [3, 10, 100])
def test_sums_of_words_are_sums_of_rounded_values(bits: int, bound: float, clients: int) -> None:
    fixed, rng = FixedPoint(bits, clients), numpy_generator(0, "fixed", bits, clients)
    values = rng.uniform(-1.3 * bound, 1.3 * bound, (clients, 40))
    values[:, 0], values[:, 1] = 1e30, -1e30  # all at their bounds, and no wrap
    total, plain, cut = np.zeros(40, fixed.dtype), np.zeros(40), 0
    for row in values:
        integers, beyond = fixed.integers(row, bound)
        total, cut = total + fixed.words(integers), cut + beyond
        plain += integers / fixed.scale(bound)
    assert np.array_equal(fixed.values(total, bound), plain) or bits == 64  # float64 adds 53 bits
    assert np.allclose(fixed.values(total, bound), plain, rtol=1e-12, atol=0)
    inside = np.clip(values, -bound, bound)
    step = 1 / fixed.scale(bound)
    off = np.abs(fixed.values(total, bound) - inside.sum(0)).max()
    assert off <= clients * (step + 1e-14 * bound)  # the second is float64's own rounding, in the plain sum
    assert cut == int((np.abs(np.rint(values / step)) > np.floor(bound / step)).sum()) > 0


@pytest.mark.parametrize(("bits", "clients", "spread"), [(16, 600, 0.0), (16, 10, 60.0), (32, 10**8, 0.0)])
def test_too_few_bits_are_refused_with_the_numbers(bits: int, clients: int, spread: float) -> None:
    with pytest.raises(ValueError, match=f"sum of {clients} clients.* in {bits} bits leaves"):
        FixedPoint(bits, clients, spread)
    with pytest.raises(ValueError, match="16, 32, 64, got 8"):
        FixedPoint(8, 3)
