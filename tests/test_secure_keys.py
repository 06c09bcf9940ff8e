"""What keys, shares and thresholds of a secure sum are bound to: laws that hold for each function alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import fedprior as fp
from fedprior import wire
from fedprior.codecs import schema_of
from fedprior.layer import Setting
from fedprior.privacy import Privacy, SecureSum, masks, secure, shamir
from fedprior.privacy.masks import SecureError, threshold_for
from fedprior.privacy.sealed import layout
from fedprior.privacy.secure import ClientState
from fedprior.rng import numpy_generator

COUNT = 7
LEAST = threshold_for(COUNT)


def bare(index: int) -> ClientState:
    return ClientState(index, numpy_generator(0, "secret", index).bytes(32))


def enrolled(clients: list[int]) -> dict[int, ClientState]:
    roster = secure.roster({i: secure.advertise(bare(i)) for i in clients})
    return {i: secure.enrol(bare(i), roster) for i in clients}


STATES = enrolled(list(range(COUNT)))
SENT = {i: secure.share(state) for i, state in STATES.items()}
ROSTER = STATES[0].roster


def test_pair_masks_belong_to_one_roster() -> None:
    """The same two clients with the same secrets, and a third one that is another: their pair mask is another."""
    words = np.zeros(100, "<u4")
    seen = [
        secure.masked(replace(enrolled([0, 1, third])[0], inbox={1: b""}), words) for third in (2, 3)
    ]  # the self mask is the same in both
    assert int((seen[0] == seen[1]).sum()) <= 1


def test_a_share_that_is_sent_back_is_noticed() -> None:
    """What 0 sealed for 1 is no message from 1 to 0: each direction has a key of its own."""
    boxes = secure.deliver(ROSTER, SENT)
    state = secure.receive(STATES[0], boxes[0])
    mine = masks.entries(SENT[0])[1]
    turned = replace(state, inbox={**state.inbox, 1: mine})
    with pytest.raises(SecureError, match="client 1 were changed"):
        secure.reveal(turned, secure.request(range(COUNT), range(COUNT)))


def test_the_two_secrets_of_a_client_are_hidden_by_different_polynomials() -> None:
    """Under one and the same, the shares of s and of b would differ by s - b everywhere."""
    shares = secure._own_shares(STATES[0]).values()
    cut = [(s[: shamir.SHARE_BYTES], s[shamir.SHARE_BYTES :]) for s in shares]
    apart = {(int.from_bytes(s, "big") - int.from_bytes(b, "big")) % shamir.PRIME for s, b in cut}
    assert len(apart) == COUNT


@pytest.mark.parametrize("there, fits", [(LEAST - 1, False), (LEAST, True)])
def test_shares_of_two_thirds_are_needed_on_both_sides(there: int, fits: bool) -> None:
    """By the server that delivers them, and by a client that receives them."""
    full = secure.deliver(ROSTER, SENT)
    some = dict(list(SENT.items())[:there])
    inbox = masks.entries(full[0])
    few = b"".join(masks.INDEX.pack(i) + inbox[i] for i in list(inbox)[: there - 1])
    for done in (lambda: secure.deliver(ROSTER, some), lambda: secure.receive(STATES[0], few)):
        if fits:
            done()
        else:
            with pytest.raises(SecureError, match=f"{there} clients .*{LEAST} are needed"):
                done()


def test_a_server_does_not_unmask_a_sum_of_too_few() -> None:
    """However many answer; clients would not, but this is not left to them."""
    asked, answer = secure.request(range(COUNT), range(LEAST - 1)), bytes(shamir.SHARE_BYTES * COUNT)
    with pytest.raises(SecureError, match=f"{LEAST - 1} clients are left, and {LEAST} are needed"):
        secure.unmask(ROSTER, asked, dict.fromkeys(range(COUNT), answer), np.zeros(3, "<u4"))


@pytest.mark.parametrize("stranger", [0, COUNT])
def test_shares_from_itself_or_from_nobody_are_refused(stranger: int) -> None:
    box = secure.deliver(ROSTER, SENT)[0]
    secure.receive(STATES[0], box)
    with pytest.raises(SecureError, match=rf"shares from \[{stranger}\], who are not in the roster"):
        secure.receive(STATES[0], box + masks.INDEX.pack(stranger) + masks.entries(box)[1])


def test_a_client_whose_vector_did_not_arrive_has_no_say() -> None:
    asked, answer = secure.request(range(COUNT), range(LEAST)), bytes(shamir.SHARE_BYTES * COUNT)
    with pytest.raises(SecureError, match=rf"replies of \[{LEAST}\] do not fit"):
        secure.unmask(ROSTER, asked, dict.fromkeys(range(LEAST + 1), answer), np.zeros(3, "<u4"))


@pytest.mark.parametrize("threshold", [2, 3, 6])
def test_one_share_too_few_gives_another_secret(threshold: int) -> None:
    """The polynomial has the whole degree, threshold - 1."""
    rng = numpy_generator(0, "degree", threshold)
    value = rng.bytes(32)
    shares = shamir.split(value, range(1, 8), threshold, rng.bytes(48 * (threshold - 1)))
    few = {x: shares[x - 1] for x in range(1, threshold)}
    assert shamir.join(few | {7: shares[6]}, threshold) == value
    assert shamir.join(few, threshold - 1) != value


@pytest.mark.parametrize("points", [[0, 1, 2], [-1, 1, 2], [1, 2, 2], [1]])
def test_points_that_make_no_shares_are_refused(points: list[int]) -> None:
    """A share at 0 is the secret itself, and two at one point are one."""
    with pytest.raises(ValueError, match="different points > 0"):
        shamir.split(bytes(32), points, 2, bytes(48))


def test_what_is_no_secret_of_32_bytes_is_refused() -> None:
    """The field is larger than 2^256 by 297 numbers."""
    assert shamir.join({1: (2**256 - 1).to_bytes(33, "big")}, 1) == b"\xff" * 32
    for number in (2**256, shamir.PRIME - 1):
        with pytest.raises(ValueError, match="not those of one secret"):
            shamir.join({1: number.to_bytes(33, "big")}, 1)


@pytest.mark.parametrize("noise", [0.3, 3.0, 50.0])
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_a_cohort_at_its_bounds_and_twelve_deviations_of_noise_do_not_wrap(
    noise: float, quantile: float | None
) -> None:
    cohort = 2000 if quantile else 9  # sigma_b is a twentieth of it, and more than half the noise
    privacy = Privacy(noise_multiplier=noise, delta=1e-5, quantile=quantile).planned(1, cohort, cohort)
    algorithm = replace(fp.fedavg(0.1, weighting="uniform"), privacy=privacy, secure=SecureSum(bits=64))
    eta, _ = algorithm.start({"w": torch.zeros(3)})
    schema = schema_of(wire.flat(algorithm.message(eta, algorithm.inference.start(algorithm.prior, eta))))
    made = layout(Setting(algorithm, schema, cohort, 0), 1, eta, privacy.clip)
    for key, field in made.fields.items():
        scale = made.fixed.scale(field.bound)
        assert cohort * field.bound * scale + 12 * field.noise * scale * cohort**0.5 <= 2**63 - 1, key
