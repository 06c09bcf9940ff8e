r"""Generalised M-steps: how far eta moves towards the exact M-step's answer eta*.

    Delta = eta* - eta
    Exact      eta' = eta*
    Damped     eta' = eta + rate Delta                                (server SGD; rate 1 is Exact)
    Momentum   m = beta m + Delta;                eta' = eta + lr m   (FedAvgM, arXiv:1909.06335)
    Adagrad    m = beta1 m + (1-beta1) Delta;     v = v + Delta^2
    Adam       m as above;                        v = beta2 v + (1-beta2) Delta^2
    Yogi       m as above;                        v = v - (1-beta2) Delta^2 sign(v - Delta^2)
               the last three:                    eta' = eta + lr m / (sqrt(v) + tau);  v starts at tau^2

Reddi et al. 2021, arXiv:2003.00295, Algorithm 2 (no bias correction; tau is the degree of adaptivity).
A flat eta is a Params: "field/name" -> tensor (tree.flatten); all steps work entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Params


def _check_positive(step: object, *names: str) -> None:
    for name in names:
        if not 0 < (value := getattr(step, name)) < math.inf:
            raise ValueError(f"{type(step).__name__} needs {name} > 0, got {value}")


def _check_fractions(step: object, *names: str) -> None:
    for name in names:
        if not 0 <= (value := getattr(step, name)) < 1:
            raise ValueError(f"{type(step).__name__} needs 0 <= {name} < 1, got {value}")


@dataclass(frozen=True)
class Exact:
    """eta' = eta*."""

    def init(self, eta: Params) -> Params:
        """No state."""
        return {}

    def step(self, eta: Params, target: Params, state: Params) -> tuple[Params, Params]:
        """The target itself."""
        return target, state


@dataclass(frozen=True)
class Damped:
    """eta' = eta + rate Delta, 0 < rate."""

    rate: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "rate")

    def init(self, eta: Params) -> Params:
        """No state."""
        return {}

    def step(self, eta: Params, target: Params, state: Params) -> tuple[Params, Params]:
        """A convex combination when rate <= 1."""
        return tree.map(lambda e, t: e + self.rate * (t - e), eta, target), state


@dataclass(frozen=True)
class Momentum:
    """Server SGD with heavy-ball momentum."""

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check_positive(self, "lr")
        _check_fractions(self, "momentum")

    def init(self, eta: Params) -> Params:
        """m = 0."""
        return tree.map(torch.zeros_like, eta)

    def step(self, eta: Params, target: Params, state: Params) -> tuple[Params, Params]:
        """Accumulate Delta, then move."""
        m = tree.map(lambda m, e, t: self.momentum * m + (t - e), state, eta, target)
        return tree.map(lambda e, m: e + self.lr * m, eta, m), m


Second = Callable[[Tensor, Tensor], Tensor]


def _adaptive(
    eta: Params, target: Params, state: Params, lr: float, beta1: float, tau: float, second: Second
) -> tuple[Params, Params]:
    """The shared lines of Algorithm 2; `second(v, Delta)` is the line in which the three differ."""
    delta = tree.map(torch.sub, target, eta)
    m = {k: beta1 * state[f"m/{k}"] + (1 - beta1) * d for k, d in delta.items()}
    v = {k: second(state[f"v/{k}"], d) for k, d in delta.items()}
    new = tree.map(lambda e, m, v: e + lr * m / (v.sqrt() + tau), eta, m, v)
    return new, {f"m/{k}": x for k, x in m.items()} | {f"v/{k}": x for k, x in v.items()}


def _adaptive_init(eta: Params, tau: float) -> Params:
    zeros = {f"m/{k}": torch.zeros_like(x) for k, x in eta.items()}
    return zeros | {f"v/{k}": torch.full_like(x, tau**2) for k, x in eta.items()}


@dataclass(frozen=True)
class Adagrad:
    """FedAdagrad."""

    lr: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "tau")
        _check_fractions(self, "beta1")

    def init(self, eta: Params) -> Params:
        """m = 0, v = tau^2."""
        return _adaptive_init(eta, self.tau)

    def step(self, eta: Params, target: Params, state: Params) -> tuple[Params, Params]:
        """v = v + Delta^2."""
        return _adaptive(eta, target, state, self.lr, self.beta1, self.tau, lambda v, d: v + d**2)


@dataclass(frozen=True)
class Adam:
    """FedAdam."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "tau")
        _check_fractions(self, "beta1", "beta2")

    def init(self, eta: Params) -> Params:
        """m = 0, v = tau^2."""
        return _adaptive_init(eta, self.tau)

    def step(self, eta: Params, target: Params, state: Params) -> tuple[Params, Params]:
        """v = beta2 v + (1 - beta2) Delta^2."""
        b = self.beta2
        return _adaptive(eta, target, state, self.lr, self.beta1, self.tau, lambda v, d: b * v + (1 - b) * d**2)


@dataclass(frozen=True)
class Yogi:
    """FedYogi."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "tau")
        _check_fractions(self, "beta1", "beta2")

    def init(self, eta: Params) -> Params:
        """m = 0, v = tau^2."""
        return _adaptive_init(eta, self.tau)

    def step(self, eta: Params, target: Params, state: Params) -> tuple[Params, Params]:
        """v = v - (1 - beta2) Delta^2 sign(v - Delta^2)."""

        def second(v: Tensor, d: Tensor) -> Tensor:
            return v - (1 - self.beta2) * d**2 * torch.sign(v - d**2)

        return _adaptive(eta, target, state, self.lr, self.beta1, self.tau, second)
