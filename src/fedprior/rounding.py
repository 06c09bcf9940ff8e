r"""Models whose weights are rounded to few bits after training: what quantisation-robust algorithms are judged by.

    step = (max W - min W) / (2^bits - 1)          W: one tensor
    rounded(W) = min W + step round((W - min W) / step)

Only trained tensors of two or more dimensions are rounded: biases and norms are few.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedprior.core import Examples, Params
from fedprior.metrics import evaluate
from fedprior.objective import Objective
from fedprior.penalties import matrices
from fedprior.result import Result


def step_of(value: Tensor, bits: int) -> Tensor:
    """The width of the grid, a scalar."""
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
    return (value.max() - value.min()) / (2**bits - 1)


def rounded(objective: Objective, phi: Params, bits: int) -> Params:
    """phi with its matrices on their grids; a tensor of equal entries stays."""

    def one(value: Tensor) -> Tensor:
        step, low = step_of(value, bits), value.min()
        return low + step * torch.round((value - low) / step) if step > 0 else value

    return phi | {name: one(value) for name, value in matrices(objective, phi).items()}


def by_bits(result: Result, test: Examples, bits: Sequence[int] = (8, 6, 4, 3, 2)) -> dict[int, dict[str, float]]:
    """Bits -> the metrics of the final model rounded to them."""
    objective, params = result.algorithm.deploy(result.eta, result.objective)
    return {b: evaluate(objective, rounded(objective, params, b), test).means() for b in bits}
