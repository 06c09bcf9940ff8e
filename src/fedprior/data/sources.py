"""The user's own arrays and datasets as Examples.

Floating or boolean x becomes float32, integer x int64 (codes of words, of characters); floating y
becomes float32 (regression), integer or boolean y int64 (classes). All is copied. NaN and
infinities are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fedprior.core import Examples


def from_arrays(x: Any, y: Any, keys: Sequence[str] | None = None) -> Examples:
    """Examples from numpy arrays, tensors or nested lists that share their first dimension.

    Args:
        x: inputs, shape (examples, ...).
        y: targets, shape (examples, ...).
        keys: the owner of each example, for `by_key`.
    """
    inputs, targets = _tensor("x", x), _tensor("y", y)
    if inputs.dtype == torch.bool:
        inputs = inputs.float()
    if targets.dtype == torch.bool:
        targets = targets.long()
    if not (inputs.ndim and targets.ndim and len(inputs)):
        raise ValueError(
            "x and y need examples along their first dimension, "
            f"got shapes {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    return Examples(inputs, targets, None if keys is None else as_keys(keys))


def from_dataset(dataset: Any, keys: Sequence[str] | None = None) -> Examples:
    """Examples from a torch TensorDataset, or from any dataset whose [i] is a pair (x, y)."""
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) != 2:
            raise TypeError(f"a TensorDataset must hold x and y; this one holds {len(dataset.tensors)} tensors")
        return from_arrays(*dataset.tensors, keys=keys)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(f"{type(dataset).__name__} has no len() and [i]; read it into arrays for from_arrays")
    pairs = [_pair(dataset[i], i) for i in range(len(dataset))]
    if not pairs:
        raise ValueError("the dataset has no examples")
    shapes = {(tuple(x.shape), tuple(y.shape)) for x, y in pairs}
    if len(shapes) > 1:
        raise ValueError(f"the dataset's (x, y) differ in shape, such as {sorted(shapes)[:2]}; pad or resize")
    x, y = (torch.stack(column) for column in zip(*pairs, strict=True))
    return from_arrays(x, y, keys)


def _pair(item: Any, i: int) -> tuple[Tensor, Tensor]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise TypeError(f"dataset[{i}] must be a pair (x, y), got {type(item).__name__}")
    x, y = item
    return _tensor(f"x of dataset[{i}]", x), _tensor(f"y of dataset[{i}]", y)


def _tensor(what: str, values: Any) -> Tensor:
    """A copy as float32, int64 or bool."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "fiub":
            raise TypeError(
                f"{what} must be numbers, got {type(values).__name__} of {array.dtype}; "
                "turn text into codes (numpy.unique(text, return_inverse=True)[1])"
            )
        integer = array.dtype.kind in "iu"
        wide = np.float32 if array.dtype.kind == "f" else np.int64 if integer else np.bool_
        with np.errstate(over="ignore"):  # too large for float32 is infinite, refused below
            values = torch.from_numpy(np.array(array, dtype=wide))
    elif values.is_complex():
        raise TypeError(f"{what} must be real numbers, got {values.dtype}")
    else:
        kind = torch.float32 if values.is_floating_point() else torch.int64
        values = values.detach().to(torch.bool if values.dtype == torch.bool else kind, copy=True)
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{what} has {bad} NaN or infinite values of {values.numel()}; drop or fill them first")
    return values


def as_keys(keys: Any) -> list[str]:
    """The keys as text; none may be missing."""
    keys = keys.tolist() if isinstance(keys, np.ndarray | Tensor) else keys
    missing = sum(key is None or key != key for key in keys)
    if missing:
        raise ValueError(f"{missing} of {len(keys)} keys are missing (None or NaN); every example needs an owner")
    return [key if isinstance(key, str) else str(key) for key in keys]
