"""What stands between the uploads and their sum: secure aggregation, privacy, robust rules. Most runs have none.

A layer is made for one round. Engines know nothing of it: what `receive` returns adds up like any statistics, and
`finish` makes of the sum what the server's step goes by.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fedprior.algorithm import Algorithm
from fedprior.core import Eta, Params, Schema, Stats
from fedprior.objective import Objective
from fedprior.privacy.dp import NoiseWarning
from fedprior.records import ClientRecord, Round

LAYERS = ("secure", "privacy", "robust")
"""The fields of an Algorithm that ask for one; an engine has `layers`, those that it can run with."""


@dataclass(frozen=True)
class Finished:
    """A round's end.

    Attributes:
        total: the statistics; None if there are none.
        why: there are none.
        records: one a client, with the layer's bytes and refusals.
        info: for the round's record.
    """

    total: Stats | None
    why: str
    records: tuple[ClientRecord, ...]
    info: dict[str, float] = field(default_factory=dict)

    def round(self, number: int, parameters_left: int, seconds: float, broadcast: float, kept_eta: str) -> Round:
        """The round's record; `broadcast` is the seconds that encoding eta took, `kept_eta` as in the record."""
        return Round(
            number=number,
            bytes_down=sum(c.bytes_down for c in self.records),
            bytes_up=sum(c.bytes_up for c in self.records),
            parameters_left=parameters_left,
            seconds=seconds,
            seconds_evaluate=0.0,
            clients=self.records,
            kept_eta=kept_eta,
            layer=self.info,
            seconds_train=sum(c.seconds for c in self.records),
            seconds_wire=broadcast + sum(c.seconds_wire for c in self.records),
        )


class Layer(Protocol):
    """One round's layer; one that `seals` makes the payloads itself."""

    @property
    def seals(self) -> bool:
        """Are payloads made by `seal(eta, stats, weight, index)` and read by `open(payload)`?"""
        ...

    def public(self) -> Any:
        """The layer without what the server's side alone holds, for other processes."""
        ...

    def receive(self, eta: Eta, stats: Stats, client: str, /) -> Stats:
        """What is summed of one upload; a PayloadError refuses it. Never called if it seals."""
        ...

    def finish(self, eta: Eta, total: Stats | None, records: Sequence[ClientRecord], /) -> Finished:
        """From the sum, None if nothing arrived, to the statistics."""
        ...


@dataclass(frozen=True)
class Setting:
    """What layers of all rounds are made from.

    Attributes:
        schema: of a client's message.
        cohort: clients a round.
    """

    algorithm: Algorithm
    schema: Schema
    cohort: int
    seed: int

    def check(self, eta: Eta) -> None:
        """A ValueError before round one if nothing is sent, or secure aggregation's bits do not hold a cohort's sum."""
        if self.algorithm.privacy is not None and not self.schema:
            raise ValueError(f"{self.algorithm.name} sends no statistics: leave privacy=... out")
        if self.algorithm.secure is not None:
            from fedprior.privacy.sealed import layout

            layout(self, 0, eta, self.algorithm.privacy.clip if self.algorithm.privacy else 0.0)

    def warn(self, eta: Eta) -> None:
        """A NoiseWarning before round one if noise drowns what the clients say."""
        privacy = self.algorithm.privacy
        if privacy is not None:
            from fedprior.privacy.layout import kept

            entries, more = sum(int(p.sum()) for p in kept(self.algorithm.prior, eta, self.schema).values()), 1.0
            if self.algorithm.secure is not None:
                from fedprior.privacy.masks import threshold_for

                more = (self.cohort / threshold_for(self.cohort)) ** 0.5
            if text := privacy.warning(entries, more):
                warnings.warn(text, NoiseWarning, stacklevel=5)  # the caller of run

    def layer(self, number: int, eta: Eta, server: Params, stages: Mapping[int, str]) -> Any:
        """The layer of one round, None for most algorithms.

        Args:
            number: of the round.
            eta: as the clients decode it.
            server: the server step's state.
            stages: of secure sums: the clients' own indices, and where each one stops, "" if nowhere.
        """
        algorithm = self.algorithm
        if algorithm.robust is not None:
            from fedprior.robust import Robust

            return Robust(algorithm, algorithm.robust)
        privacy = algorithm.privacy
        most = privacy.bound(server) if privacy else 0.0
        if algorithm.secure is not None:
            from fedprior.privacy.sealed import Sealed

            return Sealed.begin(self, number, eta, most, stages)
        if privacy is not None:
            from fedprior.privacy.central import Central

            return Central(algorithm, privacy, most, self.schema, self.seed, number)
        return None


def plan(setting: Setting, eta: Eta, objective: Objective, engine: Any, rounds: int, population: int) -> Algorithm:
    """The algorithm with its noise; a ValueError for engines, models and sizes that do not go with the layer.

    Args:
        setting: of the run, before its noise is known.
        eta: the first one.
        objective: the model and its loss.
        engine: which runs the clients.
        rounds: of the whole run.
        population: how many clients there are.
    """
    algorithm, cohort = setting.algorithm, setting.cohort
    asked = [name for name in LAYERS if getattr(algorithm, name) is not None]
    if strange := [name for name in asked if name not in getattr(engine, "layers", ())]:
        raise ValueError(
            f"{strange[0]}=... takes uploads one by one in a simulation, which {type(engine).__name__} does not do: "
            "write engine=Auto(), Workers() or Sequential()"
        )
    if algorithm.privacy is not None:
        if objective.buffers:
            raise ValueError(
                f"running means ({', '.join(sorted(objective.buffers)[:2])}, ...) do not go with privacy=...: noise "
                "makes variances negative. Use GroupNorm instead of BatchNorm"
            )
        algorithm = replace(algorithm, privacy=algorithm.privacy.planned(rounds, cohort, population))
    if algorithm.secure is not None and cohort < 3:
        raise ValueError(f"a sum of {cohort} clients hides nothing: secure=... needs a cohort of 3 at least")
    setting = replace(setting, algorithm=algorithm)
    setting.check(eta)
    setting.warn(eta)
    return algorithm
