"""The 1,797 handwritten digits that come with scikit-learn: for smoke tests and first steps.

    x  grey levels / 16, in [0, 1]     (examples, 1, 8, 8) float32
    y  the digit, 0 .. 9               (examples,) int64

Every fifth example of each digit, in scikit-learn's order, is test; the others are train.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from fedprior.core import Examples

HOW = "pip install 'fedprior[data]'"


def find() -> Path:
    """scikit-learn's folder; ModuleNotFoundError without it."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the data set 'digits' comes with scikit-learn: {HOW}")
    return Path(spec.origin).parent


def load(folder: str | Path | None = None) -> tuple[Examples, Examples]:
    """Train and test examples."""
    if folder is not None:
        raise ValueError(f"'digits' comes with scikit-learn, not in a folder; got {str(folder)!r}")
    find()
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rank = np.zeros(len(labels), np.int64)
    for digit in range(10):
        rank[labels == digit] = np.arange(np.count_nonzero(labels == digit))
    is_test = torch.from_numpy(rank % 5 == 4)
    x = torch.from_numpy((pixels / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    every = Examples(x, torch.from_numpy(labels.astype(np.int64)))
    return every.take(~is_test), every.take(is_test)
