"""Noise made by a server that is trusted: uploads are clipped as they come, and their sum gets Gaussian noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedprior import tree, wire
from fedprior.algorithm import Algorithm
from fedprior.core import Eta, Params, Schema, Stats
from fedprior.layer import Finished
from fedprior.privacy.clipping import clip, unit
from fedprior.privacy.dp import Privacy
from fedprior.privacy.layout import kept
from fedprior.records import ClientRecord
from fedprior.rng import noise_generator


@dataclass
class Central:
    """One round.

    Attributes:
        most: C.
        schema: of a client's message.
        seed, number: of the noise; in a federation the seed is a secret of the server's (federation/engine.py).
    """

    algorithm: Algorithm
    privacy: Privacy
    most: float
    schema: Schema
    seed: int
    number: int
    seals = False

    def public(self) -> Central:
        """What another process needs: all of it."""
        return self

    def receive(self, eta: Eta, stats: Stats, client: str) -> Stats:
        """The clipped difference of one client."""
        message, _ = wire.difference(self.algorithm, eta, stats)
        message, within = clip(message, self.most, self.privacy.scales)
        counted = wire.unflat(message, 1.0)
        return Stats({**counted.terms, "privacy": {"within": torch.tensor(float(within), dtype=torch.float64)}}, 1.0)

    def finish(self, eta: Eta, total: Stats | None, records: Sequence[ClientRecord]) -> Finished:
        """The noisy sum, also when nobody answered: that is not to be seen."""
        privacy, answered = self.privacy, sum(r.status == "ok" for r in records)
        message = {k: torch.zeros(shape, dtype=dtype) for k, (shape, dtype) in self.schema.items()}
        within = 0.0
        if total is not None:
            within = float(total["privacy"]["within"])
            message = wire.flat(replace(total, terms={t: v for t, v in total.terms.items() if t != "privacy"}))
        rng = noise_generator(self.seed, self.number, "privacy")
        message = self._noisy(message, eta, rng)
        like = next(iter(tree.flatten(eta).values()))
        summed = wire.unflat({k: v.to(like.device) for k, v in message.items()}, float(privacy.cohort))
        share = noisy_share(privacy, within - answered / 2, privacy.sigma_b, rng)
        return finished(self.algorithm, privacy, eta, summed, share, self.most, self.number, records)

    def _noisy(self, message: Params, eta: Eta, rng: np.random.Generator) -> Params:
        """Gaussian noise where there may be a value, and zeros elsewhere: no value is published without noise."""
        places, out = kept(self.algorithm.prior, eta, self.schema), {}
        for key, value in message.items():
            sigma = self.privacy.noise * self.most * unit(key, self.privacy.scales)
            noisy = value.cpu().double().flatten() + torch.from_numpy(sigma * rng.standard_normal(value.numel()))
            out[key] = (noisy * torch.from_numpy(places[key])).view(value.shape).to(value.dtype)
        return out


def noisy_share(privacy: Privacy, centred: float, sigma: float, rng: np.random.Generator | None) -> float:
    """b of an adaptive C: from the sum of b_s - 1/2, and noise that is still to be added."""
    noise = sigma * rng.standard_normal() if rng is not None else 0.0
    return (centred + noise) / privacy.cohort + 0.5


def finished(
    algorithm: Algorithm,
    privacy: Privacy,
    eta: Eta,
    summed: Stats,
    share: float,
    most: float,
    number: int,
    records: Sequence[ClientRecord],
) -> Finished:
    """The statistics that a noisy sum of differences stands for, and what the records tell of it."""
    stats = wire.restored(algorithm, eta, summed)
    info: dict[str, float] = {"epsilon": privacy.epsilon(number)} if privacy.noise_multiplier else {}
    info |= {"clip": most}
    terms: Mapping[str, Params] = stats.terms
    if privacy.quantile is not None:
        info["within"] = share
        terms = {**terms, "privacy": {"within": torch.tensor(share, dtype=torch.float64)}}
    return Finished(Stats(terms, stats.clients), "", tuple(records), info)
