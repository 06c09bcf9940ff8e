"""Differential privacy in whole runs: what is spent, who takes part, what C follows, and where a run ends."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

import fedprior as fp
from cases import classification_clients, close, equal, without_seconds
from fedprior import Client, Examples, checkpoint, engines, tree
from fedprior.cohort import sample
from fedprior.core import Params
from fedprior.privacy import NoiseWarning, Privacy, SecureSum
from fedprior.privacy.dp import DROWNED, STATE
from fedprior.rng import generator
from spending import spent

CLIENTS = classification_clients((8, 9, 14, 7, 6, 11, 20, 5, 9))
MODEL = fp.models.mlp(4, (6,), 3)
PLAIN = fp.fedavg(0.1, weighting="uniform")

pytestmark = pytest.mark.filterwarnings(
    "ignore::fedprior.privacy.NoiseWarning"
)  # nine clients, and noise for thousands


def go(algorithm: fp.Algorithm, rounds: int = 3, clients: Any = CLIENTS, **fields: Any) -> fp.Result:
    chosen: dict[str, Any] = {"engine": engines.Sequential()} | fields
    return fp.run(algorithm, MODEL, clients, rounds=rounds, **chosen)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_epsilon_is_that_of_dp_accounting(sampling: Any, accountant: Any) -> None:
    privacy = Privacy(noise_multiplier=2.0, delta=1e-4, sampling=sampling, accountant=accountant).planned(10, 20, 500)
    want = spent(privacy, 2.0, 10, 20, 500)
    loss = 1.05 if accountant == "rdp" else 1.0005  # fewer orders, or a coarser grid, can only be more careful
    assert want * (1 - 1e-9) <= privacy.epsilon(10) <= loss * want


def gaussian_epsilon(ratio: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8, by bisection: noise of deviation sigma, two means ratio * sigma apart."""

    def spent(epsilon: float) -> float:
        upper, lower = ratio / 2 - epsilon / ratio, -ratio / 2 - epsilon / ratio
        return float(norm.cdf(upper) - math.exp(epsilon) * norm.cdf(lower))

    low, high = 0.0, 60.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("sampling, apart", [("fixed", 2.0), ("poisson", 1.0)])
def test_without_sampling_pld_is_the_closed_form(sampling: Any, apart: float) -> None:
    """Sums that are 2 C apart if a client is replaced, C if it is not there; T rounds are one of noise / sqrt(T)."""
    privacy = Privacy(noise_multiplier=3.0, delta=1e-3, sampling=sampling, accountant="pld").planned(4, 9, 9)
    for rounds in (1, 4):
        want = gaussian_epsilon(apart * rounds**0.5 / 3.0, 1e-3)
        assert privacy.epsilon(rounds) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_fewer_clients_a_round_spend_less_and_pld_less_than_rdp(sampling: Any) -> None:
    spent = {
        (accountant, cohort): Privacy(None, 2.0, 1e-3, sampling=sampling, accountant=accountant)
        .planned(20, cohort, 100)
        .epsilon(20)
        for accountant in ("rdp", "pld")
        for cohort in (5, 20, 100)
    }
    for cohort in (5, 20, 100):
        assert spent["pld", cohort] < spent["rdp", cohort]
    for accountant in ("rdp", "pld"):
        assert spent[accountant, 5] < spent[accountant, 20] < spent[accountant, 100]


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_the_noise_that_is_found_is_the_least_to_a_hundredth(sampling: Any, accountant: Any) -> None:
    target = 5.0
    wish = Privacy(target, delta=1e-3, sampling=sampling, accountant=accountant)
    planned = wish.planned(5, 9, 100)
    assert planned.epsilon(5) <= target
    assert planned.noise_multiplier is not None
    assert replace(planned, noise_multiplier=0.99 * planned.noise_multiplier).epsilon(5) > target


def alone(client: Client) -> Params:
    """What a client has learned after one round by itself: its randomness is its own."""
    return go(PLAIN, rounds=1, clients=[client]).params


def start() -> Params:
    return {k: v.detach() for k, v in MODEL.named_parameters()}


@pytest.mark.parametrize(
    "engine", [engines.Sequential(), engines.Workers(2), engines.Auto()], ids=lambda e: type(e).__name__
)
def test_poisson_cohorts_have_no_fixed_size_and_a_fixed_divisor(engine: Any) -> None:
    """Each client by itself, with probability cohort / population; the sum over those, over the cohort asked for."""
    clips = replace(PLAIN, privacy=Privacy(noise_multiplier=0.0, delta=0.01, clip=1e3, sampling="poisson"))
    result = go(clips, rounds=12, cohort=4, engine=engine)
    chosen = [[c.index for c in r.clients] for r in result.history]
    assert chosen == [sample(0, number, 9, 4, poisson=True) for number in range(1, 13)]
    assert len({len(indices) for indices in chosen}) > 2
    assert abs(np.mean([len(indices) for indices in chosen]) - 4) < 4 * (9 * (4 / 9) * (5 / 9) / 12) ** 0.5
    first = go(clips, rounds=1, cohort=4, engine=engines.Sequential())
    moved = [tree.map(lambda a, b: a - b, alone(CLIENTS[i]), start()) for i in chosen[0]]
    want = {k: v + torch.stack([m[k] for m in moved]).sum(0) / 4 for k, v in start().items()}
    assert len(chosen[0]) != 4 and close(first.params, want, 1e-5)


def test_a_round_of_nobody_is_a_round_of_noise() -> None:
    """That nobody was chosen is not to be seen: the model moves by noise / cohort, and the round is counted."""
    privacy = Privacy(noise_multiplier=1.0, delta=0.01, sampling="poisson")
    seed = next(seed for seed in range(99) if not sample(seed, 1, 9, 1, poisson=True))
    result = go(replace(PLAIN, privacy=privacy), rounds=1, cohort=1, seed=seed)
    (record,) = result.history
    assert record.clients == () and record.kept_eta == "" and record.layer["epsilon"] > 0
    moved = torch.cat([(v - start()[k]).flatten() for k, v in result.params.items()])
    assert float(moved.std()) == pytest.approx(1.0, rel=4 / (2 * len(moved)) ** 0.5)


class Linear(torch.nn.Module):
    """Its loss has the same gradient everywhere, so that a client's norm is the same in every round."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.phi


NORMS = torch.logspace(-1, 1, 21, dtype=torch.float64)  # of the clients' messages, a factor of 1.26 apart
QUANTILES = [(None, noise, quantile, first) for noise in (0, 1) for quantile in (0.25, 0.5, 0.9) for first in (0.1, 10)]


@pytest.mark.parametrize(
    "secure, noise, quantile, first", [*QUANTILES, (SecureSum(), 1, 0.5, 0.1), (SecureSum(), 0, 0.9, 0.1)]
)
def test_an_adaptive_clip_goes_to_the_asked_quantile(secure: Any, noise: float, quantile: float, first: float) -> None:
    """C' = C exp(-rate (b - quantile)) is at rest where a share b = quantile of the clients has a norm up to C."""
    norms = NORMS if secure is None else NORMS[::2]  # shares are the slow part of a secure sum
    directions = torch.randn(len(norms), 4, generator=generator(0, "directions"), dtype=torch.float64)
    x = (norms[:, None] * directions / directions.norm(dim=1, keepdim=True)).float()
    clients = [Client(i, f"client-{i}", Examples(row[None], torch.zeros(1))) for i, row in enumerate(x)]
    wish = Privacy(noise_multiplier=noise, delta=0.01, clip=first, quantile=quantile, clip_rate=0.5)
    algorithm = replace(fp.fedavg(1.0, batch_size=None, weighting="uniform"), privacy=wish, secure=secure)
    loss = {"loss": lambda outputs, targets: outputs, "engine": engines.Sequential()}
    layers = [r.layer for r in fp.run(algorithm, Linear(), clients, rounds=50, **loss).history]
    settled = math.exp(np.mean([math.log(layer["clip"]) for layer in layers[-20:]]))
    share = float((settled >= norms).double().mean())  # which moves in steps
    step, deviation = 1 / len(norms), 0.06 if noise else 0.0  # of b: sigma_b / cohort, times 1.2 if clients make it
    assert share == pytest.approx(quantile, abs=1.5 * step + deviation)
    within = np.mean([layer["within"] for layer in layers[-20:]])
    assert within == pytest.approx(quantile, abs=step + 4 * deviation / 20**0.5)


@pytest.mark.parametrize("secure", [None, SecureSum()], ids=["central", "distributed"])
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits_and_counts_once(
    tmp_path: Path, secure: Any, quantile: Any
) -> None:
    algorithm = replace(PLAIN, secure=secure, privacy=Privacy(60.0, delta=0.01, quantile=quantile))

    class Stop(Exception):
        pass

    def stop(record: fp.Round) -> None:
        if record.number == 3:
            raise Stop

    with pytest.raises(Stop):
        go(algorithm, rounds=6, out=tmp_path / "two", on_round=stop)
    resumed = go(algorithm, rounds=6, out=tmp_path / "two", resume=True)
    whole = go(algorithm, rounds=6, out=tmp_path / "one")
    assert equal(resumed.params, whole.params)
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    privacy: Any = resumed.algorithm.privacy
    assert [r.layer["epsilon"] for r in resumed.history] == [privacy.epsilon(number) for number in range(1, 7)]
    assert resumed.history[-1].layer["epsilon"] <= 60.0
    saved = checkpoint.read(tmp_path / "two")
    assert saved is not None and (STATE in saved.server) == (quantile is not None)
    clips = [r.layer["clip"] for r in resumed.history]
    assert (len(set(clips)) == 1) == (quantile is None)
    with pytest.raises(ValueError, match="its algorithm was"):
        go(replace(algorithm, privacy=Privacy(61.0, delta=0.01)), rounds=6, out=tmp_path / "two", resume=True)


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_a_run_stops_before_it_exceeds_the_target(tmp_path: Path, sampling: Any, accountant: Any) -> None:
    """And a run that has stopped does not go on."""
    wish = Privacy(20.0, noise_multiplier=1.5, delta=0.01, sampling=sampling, accountant=accountant)
    result = go(replace(PLAIN, privacy=wish), rounds=50, out=tmp_path)
    privacy: Any = result.algorithm.privacy
    last = len(result.history)
    assert 1 <= last < 50
    assert result.history[-1].layer["epsilon"] == privacy.epsilon(last) <= 20 < privacy.epsilon(last + 1)
    again = go(replace(PLAIN, privacy=wish), rounds=50, out=tmp_path, resume=True)
    assert len(again.history) == last and equal(again.params, result.params)


@pytest.mark.parametrize("secure, more", [(None, 1.0), (SecureSum(), (9 / 6) ** 0.5)], ids=["central", "distributed"])
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_noise_that_drowns_the_signal_is_warned_of_before_round_one(
    secure: Any, more: float, quantile: float | None
) -> None:
    """|noise| is about z C sqrt(entries), |sum| is m C at most; the cohort that is named makes their ratio DROWNED."""
    entries = sum(p.numel() for p in MODEL.parameters())
    for times, warned in ((0.9, False), (1.1, True)):
        most = times * DROWNED * 9 / entries**0.5 / more  # the message's noise, at a ratio of `times` DROWNED
        z = most if quantile is None else (most**-2 + (2 * 9 / 20) ** -2) ** -0.5
        algorithm = replace(PLAIN, secure=secure, privacy=Privacy(noise_multiplier=z, delta=0.01, quantile=quantile))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            go(algorithm, rounds=1)
        texts = [str(w.message) for w in caught if issubclass(w.category, NoiseWarning)]
        assert len(texts) == warned
        for text in texts:
            assert f"{times * DROWNED:.2g} times" in text and f"{entries:,} entries" in text
            assert f"with this noise {math.ceil(1.1 * 9)} would do" in text
            assert all(advice in text for advice in ("larger cohort", "fewer rounds", "larger target_epsilon"))
            assert caught[0].filename == __file__  # of who called run


def test_a_drowned_model_is_at_chance_and_one_below_the_line_is_not() -> None:
    """What the line is for: the same run with a twentieth of DROWNED, and with ten times of it."""
    train, test = fp.data.load("digits")
    clients = fp.data.iid(train, clients=20, seed=0)
    model, found = fp.models.softmax(64, 10), {}
    for times in (0.05, 10.0):
        z = times * DROWNED * 20 / 650**0.5
        private = replace(
            fp.fedavg(0.2, weighting="uniform"), privacy=Privacy(noise_multiplier=z, delta=0.01, clip=0.3)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoiseWarning)
            found[times] = fp.run(private, model, clients, rounds=20, test=test, evaluate_every=20).accuracy
    assert found[0.05] > 0.75 > 0.4 > found[10.0], found
