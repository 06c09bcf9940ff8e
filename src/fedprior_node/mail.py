"""The only module that knows Flower's records: one blob a message, whose bytes Flower carries untouched.

A message's content is one ArrayRecord with one Array of type `STYPE`, so that none of Flower's own strategies and mods
takes it for a tensor.
"""

from __future__ import annotations

from flwr.app import (  # pyright: ignore[reportMissingImports]
    Array,
    ArrayRecord,
    Context,
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


def place(context: Context) -> tuple[int, int]:
    """This node's partition and how many there are, from the SuperNode's --node-config."""
    values = [context.node_config.get(key) for key in ("partition-id", "num-partitions")]
    partition, partitions = (value if type(value) is int else -1 for value in values)
    if not 0 <= partition < partitions:
        raise ValueError(
            f"this SuperNode's partition-id is {values[0]!r} and its num-partitions is {values[1]!r}; start the first "
            'of three with --node-config "partition-id=0 num-partitions=3"'
        )
    return partition, partitions


def _content(data: bytes) -> RecordDict:
    return RecordDict({RECORD: ArrayRecord({ARRAY: Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})})
