"""A node's reply, read as what it is: bytes from somebody who may be mistaken, or worse.

Only what a client was asked for counts, once, and with a number of examples that can be. Anything else is an upload
with the status "rejected" or "failed" and the reason; the payloads themselves are checked where they are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fedprior.codecs import PayloadError
from fedprior.federation import bundle
from fedprior.round import Upload

_ENTRY, _TEXT = 1 << 16, 4000  # bytes of a client's entry in a header, characters of its error


@dataclass(frozen=True)
class Asked:
    """What a client was sent: its name here and the length of its payload."""

    client: str
    bytes_down: int


@dataclass(frozen=True)
class Reply:
    """What a node answered.

    Attributes:
        uploads: one for each client asked, by index.
        strange: what else was in the reply, in words; empty if there was nothing.
    """

    uploads: dict[int, Upload]
    strange: str = ""


def failed(asked: Mapping[int, Asked], status: Any, reason: str) -> Reply:
    """Nothing came of any client of a node."""
    return Reply({i: Upload(i, a.client, 0, status, a.bytes_down, reason=reason) for i, a in asked.items()})


def read(blob: bytes, asked: Mapping[int, Asked], most_examples: int) -> Reply:
    """The uploads in a reply; never an error. With `most_examples` 0, clients do not tell how many they have."""
    try:
        header, parts = bundle.unpack(blob, _ENTRY * (1 + len(asked)))
        if isinstance(header.get("failed"), str):
            return failed(asked, "failed", header["failed"][-_TEXT:])
        entries = header.get("clients")
        if not isinstance(entries, list) or len(entries) != len(parts):
            raise PayloadError("its clients and payloads are not as many")
        return _uploads([e if isinstance(e, dict) else {} for e in entries], parts, asked, most_examples)
    except PayloadError as error:
        return failed(asked, "rejected", f"the node's reply: {error.reason}")


def hello(blob: bytes) -> dict[str, Any]:
    """What a node says of itself; a PayloadError for what is no such reply, with the node's own error if it tells."""
    header, _ = bundle.unpack(blob, 1 << 22)
    if isinstance(header.get("failed"), str):
        raise PayloadError(f"its error is\n{header['failed'][-_TEXT:]}")
    said = header.get("hello")
    if not isinstance(said, dict) or not all(type(said.get(key)) is int for key in ("partition", "partitions")):
        raise PayloadError("it does not say which partition it is")
    return said


def _uploads(entries: list[dict[str, Any]], parts: list[bytes], asked: Mapping[int, Asked], most: int) -> Reply:
    named = [e["client"] if type(e.get("client")) is int else None for e in entries]
    uploads = failed(asked, "rejected", "the node's reply does not have this client").uploads
    for index, entry, payload in zip(named, entries, parts, strict=True):
        if index is not None and index in asked:
            uploads[index] = _upload(index, asked[index], entry, payload, most)
    for index in _twice(named, asked):
        a = asked[index]
        uploads[index] = Upload(index, a.client, 0, "rejected", a.bytes_down, reason="the node's reply has it twice")
    strangers = [str(index) for index in named if index not in asked]
    told = ", ".join(strangers[:5]) + (", ..." if len(strangers) > 5 else "")
    return Reply(uploads, f"the reply has clients that were not asked for: {told}"[:_TEXT] if strangers else "")


def _twice(named: list[int | None], asked: Collection[int]) -> set[int]:
    seen: set[int] = set()
    return {i for i in named if i is not None and i in asked and (i in seen or seen.add(i))}


def _upload(index: int, asked: Asked, entry: Mapping[str, Any], payload: bytes, most: int) -> Upload:
    """One entry, if it is one."""
    if entry.get("status") == "failed" and isinstance(entry.get("reason"), str):
        return Upload(index, asked.client, 0, "failed", asked.bytes_down, reason=entry["reason"][-_TEXT:])
    examples = entry.get("examples")
    seconds, seconds_wire = _seconds(entry.get("seconds")), _seconds(entry.get("seconds_wire"))
    wrong = ""
    if entry.get("status") != "ok":
        wrong = "neither ok nor failed"
    elif type(examples) is not int or not min(1, most) <= examples <= most:
        wrong = f"its number of examples is {str(examples)[:40]}, and may be {min(1, most)} to {most}"
    elif min(seconds, seconds_wire) < 0:
        wrong = "its seconds are no numbers of seconds"
    if wrong or not isinstance(examples, int):
        size = len(payload)
        return Upload(index, asked.client, 0, "rejected", asked.bytes_down, payload, reason=f"{wrong} ({size} bytes)")
    return Upload(index, asked.client, examples, "ok", asked.bytes_down, payload, {}, seconds, seconds_wire)


def _seconds(value: Any) -> float:
    """A number of seconds, or -1 for what is none."""
    return value if type(value) is float and math.isfinite(value) and value >= 0 else -1.0
