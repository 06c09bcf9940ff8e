r"""Rules instead of the sum, for clients that are not trusted: Algorithm(robust=Median()).

    x_s = what client s says as a difference to what is known without its data, every term over the median of the
          clients' norms of that term, so that terms of different kinds (weights, gains) count alike

    Mean            mean of x_s                                       no defence; what the others are compared with
    NormBound       mean of the x_s with |x_s| <= factor median|x|    drops what is impossible: 1e30, scaled by 1000
    NormClip        mean of x_s min(1, factor median|x| / |x_s|)      shrinks it
    Median          median over clients, entry by entry
    TrimmedMean     mean without the least and the largest share of the clients, entry by entry
    CentredClip     v + mean of (x_s - v) min(1, r / |x_s - v|), `steps` times; v = the median at first,
                    r = factor median|x - v|
    Krum            mean of the `keep` clients with the least sum of squared distances to their n - attackers - 2
                    nearest ones

A bound on norms alone leaves lies of a possible size in: of n clients f that send -c x take n - f - c f of n votes.
About a centre a lie counts for r / n, in whatever direction and of whatever size.

Every client has one vote: numbers of examples are the clients' own word. Rules see uploads one by one, which secure
aggregation and privacy of the sum rule out. What is no valid payload or not finite was refused before (codecs).

Yin et al. 2018, arXiv:1803.01498 (median, trimmed mean); Blanchard et al. 2017, arXiv:1703.02757 (Krum);
Sun et al. 2019, arXiv:1911.07963 (norms); Karimireddy, He, Jaggi 2021, arXiv:2012.10333, algorithm 2 (centred; there v
is the last round's at first, which a run that goes on would have to keep, and r is given).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fedprior import wire
from fedprior.algorithm import Algorithm
from fedprior.codecs import schema_of
from fedprior.core import Eta, Params, Schema, Stats
from fedprior.layer import Finished
from fedprior.records import ClientRecord


class Rule(Protocol):
    """How rows become one."""

    def combine(self, rows: Tensor, /) -> tuple[Tensor, list[str]]:
        """The estimate of the mean, and for each client why it was left out, "" if it was not.

        Args:
            rows: (clients, entries), float64, finite.
        """
        ...


def _all(rows: Tensor) -> list[str]:
    return [""] * len(rows)


@dataclass(frozen=True)
class Mean:
    """The plain mean."""

    def combine(self, rows: Tensor) -> tuple[Tensor, list[str]]:
        """All rows."""
        return rows.mean(0), _all(rows)


@dataclass(frozen=True)
class NormBound:
    """The mean of those whose norm is possible.

    Attributes:
        factor: times the median norm.
    """

    factor: float = 2.0

    def __post_init__(self) -> None:
        _positive(self)

    def combine(self, rows: Tensor) -> tuple[Tensor, list[str]]:
        """Rows of a norm that is possible."""
        norms = rows.norm(dim=1)
        most = self.factor * norms.quantile(0.5)
        why = [
            f"its norm is {n:.3g} times the bound, {self.factor:g} median norms" if n > 1 else ""
            for n in (norms / most.clamp(min=1e-300)).tolist()
        ]
        return rows[[not reason for reason in why]].mean(0), why


@dataclass(frozen=True)
class NormClip:
    """The mean of rows that are scaled down to a possible norm.

    Attributes:
        factor: times the median norm.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _positive(self)

    def combine(self, rows: Tensor) -> tuple[Tensor, list[str]]:
        """All rows, some of them shorter."""
        norms = rows.norm(dim=1, keepdim=True)
        factor = self.factor * norms.quantile(0.5) / norms.clamp(min=1e-300)
        return (rows * factor.clamp(max=1)).mean(0), _all(rows)


@dataclass(frozen=True)
class CentredClip:
    """The mean of rows that are pulled towards a centre, which moves to it.

    Attributes:
        factor: times the median distance to the centre.
        steps: of the centre.
    """

    factor: float = 1.0
    steps: int = 3

    def __post_init__(self) -> None:
        _positive(self)
        if self.steps < 1:
            raise ValueError(f"CentredClip needs steps >= 1, got {self.steps}")

    def combine(self, rows: Tensor) -> tuple[Tensor, list[str]]:
        """All rows, some of them nearer."""
        centre, why = Median().combine(rows)
        for _ in range(self.steps):
            moved, _ = NormClip(self.factor).combine(rows - centre)
            centre = centre + moved
        return centre, why


@dataclass(frozen=True)
class Median:
    """The coordinate-wise median; of an even number, the mean of the two in the middle."""

    def combine(self, rows: Tensor) -> tuple[Tensor, list[str]]:
        """All rows."""
        ordered, middle = rows.sort(0).values, len(rows) // 2
        return (ordered[middle] + ordered[-middle - 1]) / 2, _all(rows)


@dataclass(frozen=True)
class TrimmedMean:
    """The coordinate-wise mean without the ends.

    Attributes:
        share: of the clients that is left out at each end, rounded up; below 0.5.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise ValueError(f"TrimmedMean needs 0 <= share < 0.5, got {self.share}")

    def combine(self, rows: Tensor) -> tuple[Tensor, list[str]]:
        """All rows; with fewer than three clients at most the median."""
        cut = min(-int(-self.share * len(rows) // 1), (len(rows) - 1) // 2)
        return rows.sort(0).values[cut : len(rows) - cut].mean(0), _all(rows)


@dataclass(frozen=True)
class Krum:
    """The mean of the rows that have the closest neighbours.

    Attributes:
        attackers: the most there may be in a cohort, f.
        keep: how many rows are averaged, at most n - f: 1 is Krum, more is multi-Krum.
    """

    attackers: int
    keep: int = 1

    def __post_init__(self) -> None:
        if self.attackers < 0 or self.keep < 1:
            raise ValueError(f"Krum needs attackers >= 0 and keep >= 1, got {self.attackers} and {self.keep}")

    def combine(self, rows: Tensor) -> tuple[Tensor, list[str]]:
        """The rows with the best scores; a ValueError if there are too few for 2 f + 2 < n."""
        if len(rows) < 2 * self.attackers + 3:
            raise ValueError(f"Krum against {self.attackers} attackers needs {2 * self.attackers + 3} uploads a round")
        squares = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        near = squares.sort(1).values[:, 1 : len(rows) - self.attackers - 1]  # the first is the row itself
        order = near.sum(1).argsort(stable=True).tolist()
        chosen = set(order[: min(self.keep, len(rows) - self.attackers)])
        why = ["" if i in chosen else "too far from the others" for i in range(len(rows))]
        return rows[sorted(chosen)].mean(0), why


def _positive(rule: NormBound | NormClip | CentredClip) -> None:
    if not 0 < rule.factor < float("inf"):
        raise ValueError(f"{type(rule).__name__} needs a finite factor > 0, got {rule.factor}")


@dataclass
class Robust:
    """One round: uploads are kept until all are there."""

    algorithm: Algorithm
    rule: Rule
    _rows: list[Params] = field(default_factory=list)
    seals = False

    def public(self) -> Robust:
        """The clients' processes need none of the uploads."""
        return replace(self, _rows=[])

    def receive(self, eta: Eta, stats: Stats, client: str) -> Stats:
        """Nothing to sum; the difference of one client is kept."""
        message, _ = wire.difference(self.algorithm, eta, stats)
        self._rows.append({k: v.detach().cpu().double() / stats.clients for k, v in message.items()})
        return Stats({}, 1.0)

    def finish(self, eta: Eta, total: Stats | None, records: Sequence[ClientRecord]) -> Finished:
        """The rule's mean, as the statistics of as many clients as it used."""
        places = [place for place, r in enumerate(records) if r.status == "ok"]
        if len(places) != len(self._rows):
            raise RuntimeError(
                f"{len(places)} uploads were accepted and {len(self._rows)} are here: one process, please"
            )
        if not places:
            return Finished(None, "no client's statistics arrived", tuple(records))
        sizes = _sizes(self._rows)
        rows = torch.stack([_vector(row, sizes) for row in self._rows])
        mean, why = self.rule.combine(rows)
        told = list(records)
        for place, reason in zip(places, why, strict=True):
            if reason:
                told[place] = replace(told[place], status="rejected", reason=f"client {told[place].client!r}: {reason}")
        used = float(sum(not reason for reason in why))
        message, _ = wire.difference(self.algorithm, eta, self._like(eta))
        summed = {k: used * v for k, v in _message(mean, schema_of(message), sizes).items()}
        device = next(iter(message.values())).device
        stats = wire.unflat({k: v.to(device, message[k].dtype) for k, v in summed.items()}, used)
        return Finished(wire.restored(self.algorithm, eta, stats), "", tuple(told))

    def _like(self, eta: Eta) -> Stats:
        """A message that says nothing, for its shapes."""
        algorithm = self.algorithm
        return algorithm.message(eta, algorithm.inference.start(algorithm.prior, eta))


def _sizes(rows: Sequence[Params]) -> dict[str, float]:
    """The median norm of each term, 1 where it is 0."""
    sizes: dict[str, float] = {}
    for term in dict.fromkeys(key.split("/", 1)[0] for key in rows[0]):
        parts = [[v.square().sum() for k, v in row.items() if k.startswith(f"{term}/")] for row in rows]
        sizes[term] = float(torch.stack([torch.stack(part).sum() for part in parts]).sqrt().quantile(0.5)) or 1.0
    return sizes


def _vector(row: Params, sizes: dict[str, float]) -> Tensor:
    return torch.cat([v.flatten() / sizes[key.split("/", 1)[0]] for key, v in row.items()])


def _message(vector: Tensor, schema: Schema, sizes: dict[str, float]) -> Params:
    """The inverse of `_vector`."""
    message, start = {}, 0
    for key, (shape, _) in schema.items():
        count = int(torch.Size(shape).numel())
        message[key] = vector[start : start + count].view(shape) * sizes[key.split("/", 1)[0]]
        start += count
    return message
