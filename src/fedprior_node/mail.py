"""The only module that knows Flower's records: one blob a message, whose bytes Flower carries untouched.

It is the wire format of both sides, and a part of the adapter of each: fedprior/federation/flower.py on the server,
fedprior_node/flower.py on a node.

A message's content is one ArrayRecord with one Array of type `STYPE`, so that none of Flower's own strategies and mods
takes it for a tensor.
"""

from __future__ import annotations

from flwr.app import (  # pyright: ignore[reportMissingImports]
    Array,
    ArrayRecord,
    Message,
    RecordDict,
)

STYPE = "fedprior.bundle.v1"
RECORD, ARRAY = "fedprior", "blob"


def request(node: int, number: int, blob: bytes, seconds: float) -> Message:
    """A message to a node, which Flower forgets after `seconds`."""
    content = _content(blob)
    return Message(content, dst_node_id=node, message_type="train.fedprior", group_id=str(number), ttl=seconds)


def reply(message: Message, blob: bytes) -> Message:
    """The answer to a message."""
    return Message(_content(blob), reply_to=message)


def blob(message: Message) -> bytes:
    """What a message holds; a ValueError for anything else."""
    content = message.content
    if set(content) != {RECORD} or not isinstance(content[RECORD], ArrayRecord):
        raise ValueError(f"holds the records {sorted(map(str, content))[:5]} instead of the ArrayRecord {RECORD!r}")
    record = content[RECORD]
    if set(record) != {ARRAY}:
        raise ValueError(f"holds the arrays {sorted(map(str, record))[:5]} instead of {ARRAY!r} alone")
    if record[ARRAY].stype != STYPE:
        raise ValueError(f"holds an array of type {record[ARRAY].stype[:80]!r} instead of {STYPE!r}")
    return record[ARRAY].data


def _content(data: bytes) -> RecordDict:
    return RecordDict({RECORD: ArrayRecord({ARRAY: Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})})
