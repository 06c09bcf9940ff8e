"""A bundle: everything that one message between the server and a node carries, as one blob.

offset  size  field                                             all little-endian
0       4     magic b"FEDB"
4       4     version
8       4     length of the header in bytes
12      ...   header: a JSON object; its "parts" are the lengths of the parts
...     ...   the parts, one after the other: the payloads of codecs/frame.py, which check themselves

The ends trust each other no further than this: what is not a bundle is a PayloadError.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from fedprior.codecs import PayloadError

MAGIC, VERSION = b"FEDB", 1
_FIELDS = struct.Struct("<4sII")


def pack(header: Mapping[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    """One blob."""
    text = json.dumps({**header, "parts": [len(part) for part in parts]}, allow_nan=False).encode()
    return b"".join([_FIELDS.pack(MAGIC, VERSION, len(text)), text, *parts])


def unpack(blob: bytes, longest: int) -> tuple[dict[str, Any], list[bytes]]:
    """The header and the parts; a header longer than `longest` bytes is refused before it is read."""
    if len(blob) < _FIELDS.size:
        raise PayloadError(f"{len(blob)} bytes, and a bundle has at least {_FIELDS.size}")
    magic, version, length = _FIELDS.unpack_from(blob)
    if (magic, version) != (MAGIC, VERSION):
        raise PayloadError(f"(magic, version) is {(magic, version)} instead of {(MAGIC, VERSION)}")
    if length > longest:
        raise PayloadError(f"header of {length} bytes, at most {longest} are allowed")
    start = _FIELDS.size + length
    if start > len(blob):
        raise PayloadError(f"header of {length} bytes in a bundle of {len(blob)}")
    header = _object(blob[_FIELDS.size : start])
    sizes = header.pop("parts", None)
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise PayloadError("its parts have no lengths")
    if sum(sizes) != len(blob) - start:
        raise PayloadError(f"parts of {sum(sizes)} bytes, and {len(blob) - start} bytes of them are here")
    parts = []
    for size in sizes:
        parts.append(blob[start : start + size])
        start += size
    return header, parts


def _object(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"header is not JSON: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise PayloadError("header is not a JSON object")
    return header
