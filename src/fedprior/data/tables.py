"""Tables as Examples, a row an example. CSV and Parquet need pandas: pip install 'fedprior[data]'.

    x     the features, in the order given (default: all others, in file order)      float32
    y     integers int64, floats float32 (regression), text and booleans as codes    int64
    keys  the client column as text: `by_key` makes one client of each value

The code of a text target is its position among the sorted distinct values, or in `classes`: pass
the same `classes` for a train and a test file, of which one may lack a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fedprior.core import Examples
from fedprior.data.sources import from_arrays

HOW = "pip install 'fedprior[data]'"


def from_csv(
    path: str | Path,
    target: str,
    client: str | None = None,
    features: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Examples:
    """Examples from a CSV file with a header line.

    Args:
        path: the file.
        target: the column to predict.
        client: the column that says whose a row is.
        features: the columns of x; they must be numeric.
        classes: the values of a text target, in the order of their codes.
    """
    # as text from the start: the clients "007" and "7" are two
    table = _needs("pandas").read_csv(path, dtype={} if client is None else {client: str})
    return _examples(table, path, target, client, features, classes)


def from_parquet(
    path: str | Path,
    target: str,
    client: str | None = None,
    features: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Examples:
    """Examples from a Parquet file; the arguments are those of `from_csv`."""
    _needs("pyarrow")
    return _examples(_needs("pandas").read_parquet(path), path, target, client, features, classes)


def _needs(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading tables needs {module}: {HOW}") from error


def _examples(
    table: Any,
    path: str | Path,
    target: str,
    client: str | None,
    features: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> Examples:
    if features is None:
        features = [str(c) for c in table.columns if c not in (target, client)]
    named = [*features, target, *([] if client is None else [client])]
    absent = [c for c in named if c not in table.columns]
    if absent:
        raise ValueError(f"{path} has no column {absent}; its columns are {list(table.columns)}")
    if not features or target in features:
        raise ValueError(f"x must be some columns other than the target {target!r}; got {features}")
    gaps = {c: int(n) for c in named if (n := table[c].isna().sum())}
    if gaps:
        raise ValueError(f"{path} has missing values: {gaps}; drop or fill them first")
    other = [c for c in features if table[c].dtype.kind not in "fiub"]
    if other:
        raise ValueError(f"features must be numeric, and {other} of {path} are not; encode or leave them out")
    x = table[list(features)].to_numpy(np.float32)
    keys = None if client is None else _shared_strings(table[client])
    return from_arrays(x, _targets(table[target], classes), keys)


def _targets(column: Any, classes: Sequence[str] | None) -> np.ndarray:
    if column.dtype.kind in "fiu" and classes is None:
        return column.to_numpy()
    names = column.astype(str)
    order = sorted(set(names)) if classes is None else [str(c) for c in classes]
    code = {name: i for i, name in enumerate(order)}
    unknown = sorted(set(names) - code.keys())
    if unknown:
        raise ValueError(f"the target column {column.name!r} has {unknown}, which are not in classes={order}")
    return names.map(code).to_numpy(np.int64)


def _shared_strings(column: Any) -> list[str]:
    """The column as text; equal values are one object, so a key costs 8 bytes a row."""
    codes, names = column.astype(str).factorize()
    names = [str(name) for name in names]
    return [names[code] for code in codes]
