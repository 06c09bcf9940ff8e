"""What happened in each round, as plain data: JSON Lines, written as it happens."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

_WITHIN = 0.9  # the share of clients that nothing is cut off, below which there is a warning
Status = Literal["ok", "dropped", "late", "rejected", "failed"]


@dataclass(frozen=True)
class ClientRecord:
    """One client in one round; bytes are lengths of payloads.

    Attributes:
        client: its name.
        status: "ok"; "dropped" (never answered) or "late" (after the deadline), simulated or, in a federation, with
            the `reason`; "rejected", its payload was refused for `reason`; "failed", its E-step raised on its node.
        seconds: of its E-step; `seconds_wire` of encoding, decoding and keeping its state, on both sides.
    """

    index: int
    client: str
    status: Status
    examples: int
    bytes_down: int
    bytes_up: int
    seconds: float
    reason: str = ""
    seconds_wire: float = 0.0


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: from 1.
        metrics: of the model after the round on the test set: nats, accuracy, ...; empty if not evaluated.
        parameters_left: live parameters after the round.
        seconds: wall time of the round without its evaluation, `seconds_evaluate` that of the evaluation.
        seconds_train: of the E-steps, summed over clients: on several cores more than the wall time.
        seconds_wire: of encoding, decoding and personal states, summed over clients and the broadcast.
        layer: with privacy `epsilon` spent so far and `clip`; with either, `within`, the share of clients that nothing
            was cut off; empty without both.
        kept_eta: why the M-step was not taken and the weights stayed as they were; empty if it was taken.
    """

    number: int
    bytes_down: int
    bytes_up: int
    parameters_left: int
    seconds: float
    seconds_evaluate: float
    metrics: dict[str, float] = field(default_factory=dict)
    clients: tuple[ClientRecord, ...] = ()
    kept_eta: str = ""
    layer: dict[str, float] = field(default_factory=dict)
    seconds_train: float = 0.0
    seconds_wire: float = 0.0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Round:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(line)
        fields["clients"] = tuple(ClientRecord(**c) for c in fields["clients"])
        return cls(**fields)

    def lost(self) -> list[ClientRecord]:
        """The clients whose statistics are not in the sum."""
        return [c for c in self.clients if c.status != "ok"]


def warning(history: Sequence[Round]) -> str:
    """One line on uploads that were refused or cut off and rounds without an update; empty if there were none."""
    told = [c for r in history for c in r.clients]
    rejected = [c for c in told if c.status == "rejected"]
    failed = [c for c in told if c.status == "failed"]
    stuck = [r for r in history if r.kept_eta]
    parts = []
    if failed:
        first = ", ".join(failed[0].reason.splitlines()[-2:])  # the error and where it happened
        parts.append(f"{len(failed)} of {len(told)} clients failed (the first: {first})")
    if rejected:
        parts.append(f"{len(rejected)} of {len(told)} uploads were refused (the first: {rejected[0].reason})")
    if stuck:
        lost = Counter(c.status for r in stuck for c in r.lost())
        why = ", ".join(f"{n} {status}" for status, n in lost.items()) or stuck[0].kept_eta
        parts.append(f"in {len(stuck)} of {len(history)} rounds the model was not updated (clients: {why})")
    # with privacy, `within` is what the clip follows
    within = [r.layer["within"] for r in history if "within" in r.layer and "clip" not in r.layer]
    if within and (mean := sum(within) / len(within)) < _WITHIN:
        parts.append(
            f"{1 - mean:.0%} of the clients had values beyond the bound of the secure sum, which were cut off: "
            "write SecureSum(bound=...) with a larger bound, or a lower learning rate"
        )
    if any("not finite" in text for text in [*(c.reason for c in rejected), *(r.kept_eta for r in stuck)]):
        parts.append("values that are not finite: look for NaN in the data, or lower the learning rate")
    return "; ".join(parts)


def write_atomically(path: Path, data: bytes) -> None:
    """All of the file or none of it, also when the machine dies: a neighbour, synced and renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk: Python does not say of which file
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}, while writing {len(data)} bytes", str(path)) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_private(path: Path, data: bytes) -> None:
    """A new file that its owner alone can read, synced; a FileExistsError if there is one."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class RecordFile:
    """An append-only file of rounds, cut back to its valid beginning on opening.

    Args:
        path: the JSON Lines file.
        last: rounds after this one (from a run that was stopped) are cut off.
    """

    def __init__(self, path: Path, last: int) -> None:
        self.rounds = [r for r in read(path) if r.number <= last]
        if [r.number for r in self.rounds] != list(range(1, last + 1)):
            raise ValueError(
                f"{path} does not have one record for each of the {last} rounds of the checkpoint; put the file back, "
                "or start again in another folder"
            )
        write_atomically(path, "".join(r.to_json() + "\n" for r in self.rounds).encode())
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def append(self, record: Round) -> None:
        """Write one round."""
        try:
            self._file.write(record.to_json() + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, in round {record.number}", str(self._path)) from error

    def sync(self) -> None:
        """Return when all rounds are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[Round]:
    """The rounds of a file; a last line that was torn by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return list(_parse(path, lines))


def _parse(path: Path, lines: list[str]) -> Iterable[Round]:
    for position, line in enumerate(lines):
        try:
            yield Round.from_json(line)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if position == len(lines) - 1 and not line.endswith("\n"):
                return
            raise ValueError(f"{path}: line {position + 1} is not a round's record: {error}") from error
