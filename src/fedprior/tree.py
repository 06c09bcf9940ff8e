"""Dicts of tensors as vectors, and a prior's eta as one flat dict of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

Params = dict[str, Tensor]


def map(function: Callable[..., Tensor], first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]) -> Params:
    """`function` applied name by name; every argument has the names of the first."""
    for other in rest:
        if other.keys() != first.keys():
            raise ValueError(f"names differ: {sorted(first.keys() ^ other.keys())}")
    return {name: function(value, *(other[name] for other in rest)) for name, value in first.items()}


def total(params: Mapping[str, Tensor]) -> Tensor:
    """The sum of all entries, a scalar."""
    return torch.stack([value.sum() for value in params.values()]).sum()


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """The inner product, a scalar."""
    return total(map(torch.mul, a, b))


def size(params: Mapping[str, Tensor]) -> int:
    """The number of entries."""
    return sum(value.numel() for value in params.values())


def counted(params: Mapping[str, Tensor]) -> Params:
    """1, 2, 3, ... in the shape of each: without a zero, and no two equal."""
    return map(lambda v: torch.arange(1, v.numel() + 1).to(v).view_as(v), params)


def finite(values: Iterable[Tensor]) -> bool:
    """Are all entries numbers?"""
    return all(bool(value.isfinite().all()) for value in values)


def digest(params: Mapping[str, Tensor], start: int = 0) -> int:
    """A checksum of all bits (CRC-32)."""
    for value in params.values():
        start = crc32(value.detach().cpu().flatten().view(torch.uint8).numpy().data, start)
    return start


def flatten(eta: Any) -> Params:
    """A NamedTuple of Params as one dict: {"mean/fc.weight": tensor, ...}."""
    if not hasattr(eta, "_fields"):
        raise TypeError(f"eta must be a NamedTuple of dicts of tensors, as `init` returns it, got {type(eta).__name__}")
    return {f"{field}/{name}": value for field in eta._fields for name, value in getattr(eta, field).items()}


def unflatten(like: Any, flat: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`, with the fields and names of `like`."""
    fields = {field: {name: flat[f"{field}/{name}"] for name in getattr(like, field)} for field in like._fields}
    return type(like)(**fields)
