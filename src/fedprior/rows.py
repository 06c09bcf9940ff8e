"""Rows of results: what a run comes to, in numbers, in JSON and for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprior.records import write_atomically

RESULTS = "results.json"
KEYS = ("algorithm", "accuracy", "nats", "bytes_up", "bytes_down", "parameters", "parameters_left", "seconds", "rounds")

Row = dict[str, Any]


def as_row(numbers: Mapping[str, Any]) -> Row:
    """KEYS, all of them; what was not measured is None."""
    return finite({key: numbers.get(key) for key in KEYS})


def finite(row: Mapping[str, Any]) -> Row:
    """JSON has no nan and no inf: they are None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def read_rows(folder: Path) -> list[Row]:
    """The rows of results.json; none if there is no such file."""
    path = folder / RESULTS
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return [{key: row[key] for key in KEYS} for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of results: {error!r}") from error


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of results for people."""
    left, total = row["parameters_left"], row["parameters"]
    share = f" ({100 * left / total:.1f} %)" if left is not None and total else ""
    return [
        str(row["algorithm"]),
        _number(row["accuracy"], ".4f"),
        _number(row["nats"], ".4f"),
        _number(row["bytes_up"] / 1e6, ",.2f"),
        _number(row["bytes_down"] / 1e6, ",.2f"),
        _number(left, ",") + share,
        _number(row["seconds"], ",.1f"),
        _number(row["rounds"], ","),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)  # noqa: RUF001


def write_json(path: Path, value: Any) -> None:
    """Write it whole, or not at all."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
