"""Personal states on their way between processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load, save

from fedprior.core import Params
from fedprior.store import ClientStore


def states(store: ClientStore, indices: Iterable[int]) -> bytes:
    """The states of these clients."""
    return packed({index: state for index in indices if (state := store.load(index)) is not None})


def new_states(work: Any) -> bytes:
    """The states of the clients whose uploads a RoundWork has accepted."""
    return states(work.store, [record.index for record in work.records if record.status == "ok"])


def packed(states: Mapping[int, Params]) -> bytes:
    """States as safetensors {"index/name": tensor}; nothing if there are none."""
    flat = {f"{index}/{name}": v for index, state in states.items() for name, v in state.items()}
    return save({k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in flat.items()}) if flat else b""


def unpacked(data: bytes) -> dict[int, Params]:
    """The inverse of `packed`."""
    states: dict[int, Params] = {}
    for key, value in load(data).items() if data else ():
        index, name = key.split("/", 1)
        states.setdefault(int(index), {})[name] = value
    return states
