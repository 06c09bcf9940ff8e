"""An empirical audit of privacy: whoever sees the noisy sums finds a client no more often than epsilon allows.

Neighbours are runs in which one client says more than may be said, in the same direction each round, and those in which
it says the opposite: the worst there is. Their scores are the sums' lengths in that direction, which are Gaussian with
means 2 C sqrt(rounds) apart, so that no better test of the two exists.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fedprior as fp
from fedprior import tree, wire
from fedprior.codecs import schema_of
from fedprior.core import Stats
from fedprior.layer import Setting
from fedprior.privacy import Privacy, SecureSum
from fedprior.privacy.central import Central
from fedprior.privacy.sealed import Sealed
from fedprior.records import ClientRecord

pytestmark = pytest.mark.filterwarnings("ignore::fedprior.privacy.NoiseWarning")
MODEL = fp.models.softmax(2, 2)
COHORT = 3  # the least that a secure sum takes
TRIALS, ROUNDS, NOISE = 300, 9, 3.0


def record(index: int, status: Any = "ok") -> ClientRecord:
    return ClientRecord(index, f"client-{index}", status, 1, 0, 0, 0.0)


class Audited:
    """Runs in which client 0 is the canary, client 1 has learned nothing, and client 2 is gone."""

    def __init__(self, privacy: Privacy, secure: SecureSum | None) -> None:
        self.privacy = privacy
        self.algorithm = replace(fp.fedavg(0.1, weighting="uniform"), privacy=privacy, secure=secure)
        self.eta, _ = self.algorithm.start({k: v.detach() for k, v in MODEL.named_parameters()})
        message = self.algorithm.message(self.eta, self.algorithm.inference.start(self.algorithm.prior, self.eta))
        self.known = wire.flat(message)

    def round(self, seed: int, number: int, sign: float) -> float:
        """The length of what one noisy sum says, in the canary's direction, in units of C."""
        said = [wire.unflat({k: v + s for k, v in self.known.items()}, 1.0) for s in (2.0 * sign, 0.0)]
        total = (self.sealed if self.algorithm.secure else self.open)(seed, number, said)
        moved = {k: v - self.privacy.cohort * self.known[k] for k, v in wire.flat(total).items()}
        return float(tree.total({k: v.double() for k, v in moved.items()})) / tree.size(self.known) ** 0.5

    def open(self, seed: int, number: int, said: list[Stats]) -> Stats:
        """The server adds the noise."""
        central = Central(self.algorithm, self.privacy, self.privacy.clip, schema_of(self.known), seed, number)
        first, second = (central.receive(self.eta, stats, "") for stats in said)
        return of(central.finish(self.eta, first + second, [record(0), record(1)]))

    def sealed(self, seed: int, number: int, said: list[Stats]) -> Stats:
        """Each client adds its share: two are the least that must stay, so their noise is no more than was promised."""
        setting = Setting(self.algorithm, schema_of(self.known), COHORT, seed)
        sealed = Sealed.begin(setting, number, self.eta, self.privacy.clip, {0: "", 1: "", 2: "masked"})
        first, second = (sealed.open(sealed.seal(self.eta, stats, 1.0, i)) for i, stats in enumerate(said))
        return of(sealed.finish(self.eta, first + second, [record(0), record(1), record(2, "dropped")]))

    def scores(self, sign: float, rounds: int) -> np.ndarray:
        """Of `TRIALS` runs, each by a seed of its own."""
        first = 0 if sign > 0 else TRIALS
        return np.array(
            [sum(self.round(seed, n, sign) for n in range(1, rounds + 1)) for seed in range(first, first + TRIALS)]
        ) / (rounds**0.5)


def of(finished: Any) -> Stats:
    assert finished.total is not None, finished.why
    return finished.total


def found_too_often(there: np.ndarray, absent: np.ndarray, epsilon: float, delta: float) -> bool:
    """true positives > e^eps false positives + delta at some threshold, beyond four standard errors."""
    for threshold in np.linspace(-3 * NOISE, 3 * NOISE, 37):
        found, false = (there > threshold).mean(), (absent > threshold).mean()
        errors = [4 * (p * (1 - p) / TRIALS) ** 0.5 + 4 / TRIALS for p in (found, false)]
        if found - errors[0] > np.exp(epsilon) * (false + errors[1]) + delta:
            return True
    return False


def private(noise: float, secure: SecureSum | None) -> Audited:
    return Audited(
        Privacy(noise_multiplier=noise, delta=0.01, accountant="pld").planned(ROUNDS, COHORT, COHORT), secure
    )


SECURE = pytest.param(SecureSum(), marks=pytest.mark.slow, id="distributed")


@pytest.mark.parametrize("rounds", [1, pytest.param(ROUNDS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("secure", [pytest.param(None, id="central"), SECURE])
def test_a_canary_is_not_found_more_often_than_epsilon_allows(secure: SecureSum | None, rounds: int) -> None:
    """With a tenth of the noise the same audit finds it; and several rounds tell more than one round's epsilon."""
    audited = private(NOISE, secure)
    there, absent = audited.scores(1.0, rounds), audited.scores(-1.0, rounds)
    epsilon, delta = audited.privacy.epsilon(rounds), audited.privacy.delta
    assert not found_too_often(there, absent, epsilon, delta)
    assert found_too_often(there, absent, audited.privacy.epsilon(1), delta) == (rounds > 1)
    apart, error = 2 * rounds**0.5, 4 * NOISE * (2 / TRIALS) ** 0.5
    assert there.mean() - absent.mean() == pytest.approx(apart, abs=error)
    for scores in (there, absent):
        assert scores.std() == pytest.approx(NOISE, rel=4 / (2 * TRIALS) ** 0.5)
    less = private(NOISE / 10, secure)
    assert found_too_often(less.scores(1.0, 1), less.scores(-1.0, 1), audited.privacy.epsilon(1), delta)
