"""What clients have before and after they adapt: a file of a finished run, and lines for people.

    before    the model as it arrives at a client, with the client's own parameters if it keeps any
    after     what the client predicts with once it has trained on its examples (Result.personal)

Both on the client's held-out examples. An E-step a client takes as long as it does in a round, so that only the first
`MOST` clients are asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from fedprior.algorithm import Algorithm
from fedprior.core import Population
from fedprior.metrics import Row, by_seen, over_clients
from fedprior.result import Result
from fedprior.rows import finite, write_json

PERSONALISED = "personalised.json"
MOST = 100
HOLDOUT = 0.2  # what BLIND advises
BLIND = (
    "clients end with models of their own, and the numbers above are the server's model's. "
    "To see clients before and after they adapt, hold out some of their examples"
)
TITLE = "held-out examples of each client, before and after it has adapted"
_SCORES = ("accuracy", "squared_error", "nats")  # the first one that is there is shown


def write(result: Result, clients: Population, folder: Path) -> None:
    """Result.personalised of the clients that have held-out examples, among the first `MOST`; no file if none has."""
    held = [
        c for c in (clients[i] for i in range(min(MOST, len(clients)))) if c.held_out is not None and len(c.held_out)
    ]
    if held:
        write_json(folder / PERSONALISED, [finite(row) for row in result.personalised(held)])


def read(folder: Path) -> list[Row]:
    """The rows, with nan for what was not finite; none if there is no such file."""
    path = folder / PERSONALISED
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a list of clients: {error!r}") from error


def could_hold_out(rows: Sequence[Row]) -> bool:
    """Would one of the first `MOST` clients put examples aside, if asked for `HOLDOUT` of them?

    Args:
        rows: of Result.per_client, where none has.
    """
    return any(round(HOLDOUT * int(row["examples"])) > 0 for row in rows[:MOST])


def score_of(rows: Sequence[Row]) -> str:
    """What to show of the rows: accuracy, else another score of the loss, else nats."""
    return next(name for name in _SCORES if all(f"after_{name}" in row for row in rows))


def titles(score: str) -> list[str]:
    """Of the columns of `cells`."""
    name = score.replace("_", " ")
    return ["algorithm", "clients", f"{name} before", "worst decile", f"{name} after", "worst decile"]


def cells(algorithm: str, rows: Sequence[Row], score: str) -> list[list[str]]:
    """A line for the clients that took part in a round, and one for those that did not."""
    lines = []
    for kind, some in by_seen(rows).items():
        spread = over_clients(some)
        numbers = [spread[f"{when}_{score}"][of] for when in ("before", "after") for of in ("mean", "worst_decile")]
        lines.append([algorithm, f"{len(some)} {kind}", *(f"{v:.4f}" if math.isfinite(v) else "–" for v in numbers)])  # noqa: RUF001
    return lines


def has_own(algorithm: Algorithm) -> bool:
    """Do clients end with models of their own, which no evaluation of the server's model sees?"""
    parts = getattr(algorithm.prior, "parts", {"*": algorithm.prior}).values()
    return any(hasattr(part, "kept") for part in parts) or hasattr(algorithm.inference, "personal")
