"""Which models are not stacked, and the words for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
from fedprior import priors
from fedprior.inference.stacked import why_not
from fedprior.objective import Objective

PIXELS, LETTERS = torch.rand(2, 1, 28, 28), torch.randint(7, (2, 80))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "dense": (lambda: fp.models.mlp(784, (3,), 4), PIXELS, ""),
    "convolutions": (lambda: fp.models.lenet((2, 3), 4), PIXELS, "Conv2d layers are slow"),
    "recurrent": (lambda: fp.models.char_gru(7, 3, 5), LETTERS, "GRU layers are slow"),
    "attention": (lambda: fp.models.char_transformer(7, width=8, head_dim=4, depth=1), LETTERS, "no batching rule"),
    "moments": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4)),
        PIXELS,
        "running statistics",
    ),
    "draws": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.Dropout()), PIXELS, "cannot be stacked"),
}


@pytest.mark.parametrize("name", MODELS)
def test_why_a_model_is_not_stacked(name: str) -> None:
    """And no warning of PyTorch's reaches the user, the first time or later."""
    make, x, reason = MODELS[name]
    y = torch.randint(4, (2,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            told = why_not(Objective(make()), priors.Gaussian(), x, y)
            assert reason in told and bool(reason) == bool(told)
