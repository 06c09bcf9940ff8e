r"""Differential privacy of clients: Algorithm(privacy=Privacy(target_epsilon=8, clip=0.5)).

    total = sum_s clip(d_s) + N(0, (z C)^2 unit^2)          mean = total / m,  m = the cohort that was asked for

d_s is client s's message as the difference to what is known without its data (clipping.py). What the server's step, the
model and later rounds make of the noisy sum costs nothing more. The divisor m is fixed: how many answered, and whose
payload was refused, may depend on the data. All of a client's examples are one unit of privacy.

    where noise is made    who is trusted
    by the server          the server sees uploads and adds Gaussian noise to their sum (central)
    by the clients         with SecureSum: each adds discrete Gaussian noise of variance (z C)^2 / least, least being
                           the clients that must stay; the server sees the noisy sum alone, on a grid (distributed)

With an adaptive C, the sum of b_s - 1/2 (b_s: was client s within C?) travels too, with noise of deviation sigma_b, and
the noise of the message grows to (z^-2 - (2 sigma_b)^-2)^(-1/2), so that a round costs what z says.

What the clients say has a norm of m C at most, and what is added to it one of about z C sqrt(entries): a run in which
the second is more than DROWNED times the first is warned of.

Andrew et al. 2021, arXiv:1905.03871, theorem 1; Kairouz, Liu, Steinke 2021, arXiv:2102.06387 (distributed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from fedprior.core import Params, Stats
from fedprior.privacy import accountant as accounting

Sampling = Literal["fixed", "poisson"]
Accountant = Literal["rdp", "pld"]
STATE = "privacy/clip"
DROWNED = 10.0  # softmax regression on Fashion-MNIST lost 7 points at 8 and 17 at 16; an MLP nothing at either


class NoiseWarning(UserWarning):
    """There is more noise than many models learn through."""


@dataclass(frozen=True)
class Privacy:
    """How much noise, and how it is counted. Give noise_multiplier, target_epsilon, or both.

    Attributes:
        target_epsilon: of the whole run, at `delta`; finds the noise, or ends a run with a given noise in time.
        noise_multiplier: z, the noise's standard deviation in units of C; 0 clips only.
        delta: below 1 / clients.
        clip: C, or the first C if it adapts.
        quantile: of the clients' norms that C follows; None for a fixed C.
        clip_rate: of an adaptive C.
        units: term -> what 1 means in its norm (clipping.py); terms that are not named have 1.
        sampling: "fixed": cohorts of one size, without replacement; "poisson": each client with the same probability.
        accountant: "rdp", or "pld", which is tighter and takes up to a second a round.
        cohort, population: of the run, once it begins.
    """

    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    clip: float = 1.0
    quantile: float | None = None
    clip_rate: float = 0.2
    units: tuple[tuple[str, float], ...] | Mapping[str, float] = ()
    sampling: Sampling = "fixed"
    accountant: Accountant = "rdp"
    cohort: int = 0
    population: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", tuple(dict(self.units).items()))  # hashable: epsilons are remembered
        wishes = (self.target_epsilon, self.noise_multiplier)
        if wishes == (None, None):
            raise ValueError("Privacy needs target_epsilon=..., noise_multiplier=..., or both")
        if not (0 < (self.target_epsilon or 1) < math.inf and 0 <= (self.noise_multiplier or 0) < math.inf):
            raise ValueError(f"Privacy needs target_epsilon > 0 and noise_multiplier >= 0, got {wishes}")
        if self.target_epsilon == 0 or not 0 < self.delta < 1:
            raise ValueError(f"Privacy needs target_epsilon > 0 and 0 < delta < 1, got {wishes[0]} and {self.delta}")
        if not all(0 < v < math.inf for v in [self.clip, self.clip_rate, *dict(self.units).values()]):
            raise ValueError(f"clip, clip_rate and units must be > 0, got {self.clip}, {self.clip_rate}, {self.units}")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be between 0 and 1, got {self.quantile}")
        for name, kind in (("sampling", Sampling), ("accountant", Accountant)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    def __str__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if v not in (None, (), 0) and k not in ("cohort", "population")}
        return f"Privacy({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    @property
    def scales(self) -> Mapping[str, float]:
        """`units` as a mapping."""
        return dict(self.units)

    def planned(self, rounds: int, cohort: int, population: int) -> Privacy:
        """With the noise for a run; a ValueError if not one round is within the target."""
        if self.delta * population >= 1:
            raise ValueError(
                f"delta={self.delta:g} promises nothing to one of {population} clients: give one well below "
                f"1 / {population}"
            )
        self = replace(self, cohort=cohort, population=population)
        if self.noise_multiplier is None:
            self = replace(self, noise_multiplier=accounting.noise_for(self, rounds))
        if self.spent(0):
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier:g} spends epsilon {self.epsilon(1):.3g} in one round of "
                f"{cohort} of {population} clients, and target_epsilon is {self.target_epsilon:g}: give more noise"
            )
        if self.quantile is not None and self.noise_multiplier:
            _ = self.noise  # which refuses what cannot be split
        return self

    def epsilon(self, rounds: int) -> float:
        """Spent after so many rounds."""
        return accounting.epsilon(self, rounds)

    def spent(self, rounds: int) -> bool:
        """Would one more round than these exceed the target?"""
        return self.target_epsilon is not None and self.epsilon(rounds + 1) > self.target_epsilon

    @property
    def sigma_b(self) -> float:
        """Noise of the sum of b_s - 1/2; 0 for a fixed C."""
        return self.cohort / 20 if self.quantile is not None and self.noise_multiplier else 0.0

    @property
    def noise(self) -> float:
        """Standard deviation of the message's noise, in units of C."""
        z = self.noise_multiplier or 0.0
        if not self.sigma_b:
            return z
        if 2 * self.sigma_b <= z:
            raise ValueError(
                f"quantile={self.quantile} spends all of noise_multiplier={z:.3g} on counting {self.cohort} clients: "
                "give a larger cohort, or a fixed clip"
            )
        return (z**-2 - (2 * self.sigma_b) ** -2) ** -0.5

    def warning(self, entries: int, more: float) -> str:
        """What to change if the noise drowns what the clients say; empty if it does not.

        Args:
            entries: of a client's message.
            more: noise than is needed, a factor.
        """
        ratio = more * self.noise * entries**0.5 / self.cohort
        if ratio <= DROWNED:
            return ""
        enough = math.ceil(ratio / DROWNED * self.cohort)
        return (
            f"the noise of a round has {ratio:.2g} times the largest norm that the sum of {self.cohort} clipped "
            f"clients can have (noise_multiplier {self.noise_multiplier:.3g}, {entries:,} entries), and may cost "
            f"accuracy, or all of it. Give a larger cohort (with this noise {enough:,} would do), fewer rounds, a "
            "larger target_epsilon, or a smaller model"
        )

    def init(self) -> Params:
        """The state that goes with the server's: C, if it adapts."""
        return {} if self.quantile is None else {STATE: torch.tensor(self.clip, dtype=torch.float64)}

    def bound(self, state: Params) -> float:
        """The C of this round."""
        return float(state[STATE]) if STATE in state else self.clip

    def step(self, state: Params, total: Stats) -> Params:
        """The next C, from the noisy share of clients within it."""
        if self.quantile is None or "privacy" not in total.terms:
            return state
        share = total["privacy"]["within"].double().cpu()
        return {STATE: state[STATE].cpu() * torch.exp(-self.clip_rate * (share - self.quantile))}


def check(algorithm: Any) -> None:
    """Refuse what has no bounded sensitivity.

    Args:
        algorithm: an Algorithm with `privacy`.
    """
    if algorithm.individual:
        raise ValueError(f"{type(algorithm.prior).__name__} needs uploads one by one: privacy=... is of their sum")
    if algorithm.weighting != "uniform":
        raise ValueError(
            "privacy=... needs weighting='uniform': a client's number of examples is private as well, and weights "
            "would be clipped away (--weighting uniform)"
        )
    if algorithm.privacy.sampling == "poisson" and (algorithm.secure or algorithm.budget):
        raise ValueError(
            "sampling='poisson' has cohorts of no fixed size, which secure=... and budget=... need: write "
            "sampling='fixed'"
        )
