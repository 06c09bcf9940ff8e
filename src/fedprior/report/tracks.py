"""What a report is made of, read from a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedprior import personalised
from fedprior.compare import CLIENTS, TOML, holds_run, row_of_records
from fedprior.records import Round
from fedprior.records import read as read_rounds
from fedprior.rows import Row, read_rows
from fedprior.run import RECORDS


@dataclass(frozen=True)
class Track:
    """One run's records.

    Attributes:
        row: the line of results.json.
        rounds: records.jsonl.
        clients: clients.json, the final model on each client; empty for an unfinished run.
        toml: run.toml; empty if there is none.
        personalised: personalised.json, clients before and after they adapt; empty where there is none.
    """

    row: Row
    rounds: list[Round]
    clients: list[dict[str, Any]]
    toml: str
    personalised: list[personalised.Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the algorithm."""
        return str(self.row["algorithm"])

    def evaluated(self, metric: str) -> tuple[list[int], list[float], list[float]]:
        """Round, value and MB sent so far in both directions, of the rounds that were evaluated."""
        sent = accumulate(r.bytes_up + r.bytes_down for r in self.rounds)
        points = [(r.number, r.metrics[metric], b / 1e6) for r, b in zip(self.rounds, sent, strict=True) if r.metrics]
        number, value, megabytes = (list(column) for column in zip(*points, strict=True)) if points else ([], [], [])
        return number, value, megabytes

    def spread(self, metric: str) -> list[float]:
        """The metric of each client, ascending."""
        return sorted(float(c[metric]) for c in self.clients if c.get(metric) is not None)


def read(folder: Path) -> list[Track]:
    """The run in `folder`, or the runs in its subfolders in the order of results.json, if they have a round."""
    places = [folder] if holds_run(folder) else sorted(path.parent for path in folder.glob(f"*/{RECORDS}"))
    tracks = [track for track in map(_track, places) if track.rounds]
    if not tracks:
        raise ValueError(f"{folder} holds no records of rounds: a run's folder has {RECORDS}, or its subfolders have")
    order = [row["algorithm"] for row in read_rows(folder)]
    return sorted(tracks, key=lambda t: order.index(t.name) if t.name in order else len(order))


def metric_of(tracks: list[Track]) -> str:
    """What to plot: accuracy, or nats if a run has none."""
    measured = [r.metrics for t in tracks for r in t.rounds if r.metrics]
    return "accuracy" if measured and all("accuracy" in m for m in measured) else "nats"


def _track(folder: Path) -> Track:
    rounds = read_rounds(folder / RECORDS)
    rows = read_rows(folder)
    finished = bool(rows) and rows[0]["rounds"] == len(rounds)
    clients, toml = folder / CLIENTS, folder / TOML
    try:
        per_client = json.loads(clients.read_text(encoding="utf-8")) if finished and clients.exists() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{clients} is not JSON: {error}") from error
    text = toml.read_text(encoding="utf-8") if toml.exists() else ""
    adapted = personalised.read(folder) if finished else []
    return Track(rows[0] if finished else row_of_records(folder), rounds, per_client, text, adapted)
