"""A round under secure aggregation: what a client masks and uploads, and what the server makes of the sum.

Keys, shares and their bytes are the matter of `parties` (parties.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedprior import tree, wire
from fedprior.algorithm import Algorithm
from fedprior.core import Eta, Stats
from fedprior.layer import Finished, Setting
from fedprior.privacy import secure
from fedprior.privacy.central import finished, noisy_share
from fedprior.privacy.clipping import clip, unit
from fedprior.privacy.fixed_point import FixedPoint
from fedprior.privacy.layout import Field, Layout, kept
from fedprior.privacy.masks import SecureError, threshold_for
from fedprior.privacy.parties import Simulated
from fedprior.records import ClientRecord


def layout(setting: Setting, number: int, eta: Eta, most: float) -> Layout:
    """The vector of a round; a ValueError if the bits do not hold the sum of a cohort.

    Args:
        setting: with the algorithm.
        number: of the round.
        eta: as the clients decode it.
        most: C of the algorithm's privacy, if it has one.
    """
    algorithm, cohort = setting.algorithm, setting.cohort
    secure_sum, privacy = _parts(algorithm)
    places = kept(algorithm.prior, eta, setting.schema)
    one = np.ones(1, bool)
    if privacy is None:
        fixed = FixedPoint(secure_sum.bits, cohort)
        terms = {key: key.split("/", 1)[0] for key in setting.schema}
        bounds = {key: secure_sum.bound_of(term, algorithm.prior) * secure_sum.most for key, term in terms.items()}
        fields = {key: Field(places[key], bound) for key, bound in bounds.items()}
        fields |= {"weight": Field(one, secure_sum.most), "within": Field(one, 1.0)}
        return Layout(setting.schema, fields, fixed, number)
    least = threshold_for(cohort)
    spread = math.sqrt(cohort / least) * max(privacy.noise, 2 * privacy.sigma_b)
    fixed = FixedPoint(secure_sum.bits, cohort, spread)
    bounds = {key: most * unit(key, privacy.scales) for key in setting.schema}
    fields = {key: Field(places[key], b, privacy.noise * b / math.sqrt(least)) for key, b in bounds.items()}
    fields |= {"weight": Field(one, 1.0), "within": Field(one, 0.5, privacy.sigma_b / math.sqrt(least))}
    made = Layout(setting.schema, fields, fixed, number)
    if (slack := rounding(made, privacy.scales)) > most / 4:
        raise ValueError(
            f"rounding to {secure_sum.bits} bits may move a message by {slack:.2g}, and clip is {most:.2g}: "
            f"write SecureSum(bits={32 if secure_sum.bits == 16 else 64})"
        )
    return made


def rounding(made: Layout, units: Mapping[str, float]) -> float:
    """How far rounding may move a message in the norm of clipping.py: half a step in every entry."""
    halves = {k: made.fields[k].count * (0.5 / made.fixed.scale(made.fields[k].bound)) ** 2 for k in made.schema}
    return math.sqrt(sum(square / unit(k, units) ** 2 for k, square in halves.items()))


def _parts(algorithm: Algorithm) -> tuple[Any, Any]:
    return algorithm.secure, algorithm.privacy


@dataclass
class Sealed:
    """One round.

    Attributes:
        most: C of the algorithm's privacy.
        layout: of the masked vectors.
        cohort: clients that were asked; of these, two thirds must stay.
        parties: the clients: Secrets where they upload, Parties where their sum is unmasked, Simulated for both.
    """

    algorithm: Algorithm
    seed: int
    number: int
    most: float
    layout: Layout
    cohort: int
    parties: Any
    seals = True

    @classmethod
    def begin(cls, setting: Setting, number: int, eta: Eta, most: float, stages: Mapping[int, str]) -> Sealed:
        """A simulated round of clients, each of which stops at a stage, "" at none."""
        made = layout(setting, number, eta, most)
        parties = Simulated(setting.seed, number, stages)
        return cls(setting.algorithm, setting.seed, number, most, made, len(stages), parties)

    @property
    def lost(self) -> Mapping[int, str]:
        """Who of a simulation is not in the round any more when training begins, and why."""
        return self.parties.lost if isinstance(self.parties, Simulated) else {}

    def public(self) -> Sealed:
        """Without what the server's side alone holds."""
        return replace(self, parties=self.parties.public())

    def seal(self, eta: Eta, stats: Stats, weight: float, index: int) -> bytes:
        """What client `index` uploads; nothing if its values are not finite."""
        secure_sum, privacy = _parts(self.algorithm)
        message, _ = wire.difference(self.algorithm, eta, stats)
        if not tree.finite(message.values()):
            return b""
        rng = self.parties.noise(index)
        if privacy is not None:
            room = self.most - rounding(self.layout, privacy.scales)
            message, inside = clip(message, room, privacy.scales)
            within = (float(inside) - 0.5) if privacy.quantile is not None else 0.0
            _, words = self.layout.encode(message, 1.0, within, rng)
        else:
            weight = min(weight, secure_sum.most)
            message = {k: weight * v for k, v in message.items()}
            _, words = self.layout.encode(message, weight, float(not self.layout.beyond(message)), rng)
        return self.layout.pack(secure.masked(self.parties.state(index), words))

    def open(self, payload: bytes) -> Stats:
        """A masked vector as something that adds: 64-bit integers wrap around, as those of fewer bits do in them."""
        words = self.layout.unpack(payload).astype(np.uint64).view(np.int64)
        return Stats({"masked": {"words": torch.from_numpy(words)}}, 1.0)

    def receive(self, eta: Eta, stats: Stats, client: str) -> Stats:
        """There are no single statistics."""
        raise TypeError("masked uploads are opened, and never decoded")

    def finish(self, eta: Eta, total: Stats | None, records: Sequence[ClientRecord]) -> Finished:
        """Ask for the shares, unmask, and count the bytes of all stages."""
        alive, least = [r.index for r in records if r.status == "ok"], threshold_for(self.cohort)
        if total is None or len(alive) < least:
            why = f"{len(alive)} clients are left, and {least} are needed to unmask their sum"
            return Finished(None, why, self._counted(records))
        words = total["masked"]["words"].numpy().view(np.uint64).astype(self.layout.fixed.dtype)
        asked = secure.request(self.parties.members, alive)
        replies = self.parties.reveal(asked, alive)
        told = self._counted(records)
        try:
            message, weight, within = self.layout.decode(secure.unmask(self.parties.roster, asked, replies, words))
        except SecureError as error:  # too few answered: there is no sum, and the round says so
            return Finished(None, str(error), told)
        device = next((v.device for v in tree.flatten(eta).values()), torch.device("cpu"))  # none: all is personal
        message = {k: v.to(device) for k, v in message.items()}
        privacy = self.algorithm.privacy
        if privacy is not None:
            summed = wire.unflat(message, float(privacy.cohort))
            share = noisy_share(privacy, within, 0.0, None)
            return finished(self.algorithm, privacy, eta, summed, share, self.most, self.number, told)
        stats = wire.restored(self.algorithm, eta, wire.unflat(message, weight))
        return Finished(stats, "", told, {"within": within / len(alive)})

    def _counted(self, records: Sequence[ClientRecord]) -> tuple[ClientRecord, ...]:
        """With the bytes of keys, shares and answers."""
        up, down = self.parties.up, self.parties.down
        return tuple(
            replace(r, bytes_up=r.bytes_up + up.get(r.index, 0), bytes_down=r.bytes_down + down.get(r.index, 0))
            for r in records
        )
