r"""Discrete Gaussian noise: integers with  P(k) proportional to exp(-k^2 / (2 sigma^2)).

    t = floor(sigma) + 1;   Y discrete Laplace,  P(Y = k) proportional to exp(-|k| / t)
    accept Y with probability exp(-(|Y| - sigma^2 / t)^2 / (2 sigma^2))

Canonne, Kamath, Steinke 2020, arXiv:2004.00010, algorithm 3, in float64 instead of exact fractions.
"""

from __future__ import annotations

import math

import numpy as np


def discrete_gaussian(sigma: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` draws, int64; sigma > 0."""
    t = math.floor(sigma) + 1
    drawn: list[np.ndarray] = []
    missing = count
    while missing > 0:
        tries = 2 * missing + 16
        # the difference of two geometric variables is discrete Laplace
        y = rng.geometric(-math.expm1(-1 / t), tries) - rng.geometric(-math.expm1(-1 / t), tries)
        accept = np.exp(-((np.abs(y) - sigma**2 / t) ** 2) / (2 * sigma**2))
        drawn.append(y[rng.random(tries) < accept])
        missing -= len(drawn[-1])
    return np.concatenate([*drawn, np.zeros(0, np.int64)])[:count]
