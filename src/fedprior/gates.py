r"""The hard-concrete gate: a Bernoulli gate that gradients pass through.

    u ~ U(0, 1);  s = sigmoid((logit u + log_alpha) / T);  z = clip(s (zeta - gamma) + gamma, 0, 1)
    pi = P(z > 0) = sigmoid(log_alpha - T log(-gamma / zeta))
    gamma = -0.1, zeta = 1.1, T = 2/3;  log_alpha is kept in [log 0.01, log 100], pi in [0.047, 0.998]

Louizos, Welling, Kingma 2018, arXiv:1712.01312, section 2.2 and eq. (13) for the gate at test time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA, ZETA, TEMPERATURE = -0.1, 1.1, 2 / 3
BOUND = math.log(100)
_SHIFT = TEMPERATURE * math.log(-GAMMA / ZETA)


def keep_probability(log_alpha: Tensor) -> Tensor:
    """pi = P(z > 0)."""
    return torch.sigmoid(log_alpha - _SHIFT)


def log_alpha_for(keep: Tensor) -> Tensor:
    """The log_alpha with P(z > 0) = keep, within its bounds."""
    return (torch.logit(keep, eps=1e-6) + _SHIFT).clamp(-BOUND, BOUND)


def hard_concrete(log_alpha: Tensor, u: Tensor) -> Tensor:
    """z for uniform noise u in (0, 1)."""
    s = torch.sigmoid((torch.logit(u) + log_alpha) / TEMPERATURE)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def at_test_time(keep: Tensor) -> Tensor:
    """The gate without noise of units alive with probability `keep`; exactly 0 below keep = 0.31."""
    return (torch.sigmoid(log_alpha_for(keep)) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def uniform(like: Tensor, rng: torch.Generator) -> Tensor:
    """Noise in (0, 1), drawn on the CPU so that every device sees the same."""
    return torch.rand(like.shape, generator=rng, dtype=like.dtype).clamp(1e-6, 1 - 1e-6).to(like.device)
