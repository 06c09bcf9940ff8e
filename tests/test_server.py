"""Server steps against the lines of Reddi et al. 2021, Algorithm 2, and Hsu et al. 2019, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import fedprior as fp
from cases import classification_clients, close, equal, normal
from fedprior import inference, priors, server, tree
from fedprior.codecs import Dense
from fedprior.rng import generator

ETA = {"mean/a": torch.zeros(3, 2, dtype=torch.float64), "mean/b": torch.zeros((), dtype=torch.float64)}
ROUNDS = 8

Update = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""(x, delta, m, v) -> (x, m, v), entry by entry."""


def algorithm_2(lr: float, beta1: float, tau: float, second: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Update:
    """Lines 10 to 15 of the paper's Algorithm 2; the three differ in the line of v."""

    def update(x, delta, m, v):
        m = beta1 * m + (1 - beta1) * delta
        v = second(v, delta)
        return x + lr * m / (np.sqrt(v) + tau), m, v

    return update


def hsu(lr: float, beta: float) -> Update:
    def update(x, delta, m, v):
        m = beta * m + delta
        return x + lr * m, m, v

    return update


@dataclass(frozen=True)
class Case:
    step: object
    update: Update
    tau: float = 0.0

    def __str__(self) -> str:
        return repr(self.step)


CASES = [
    Case(server.Momentum(0.7, 0.9), hsu(0.7, 0.9)),
    Case(server.Adagrad(0.2, tau=1e-2), algorithm_2(0.2, 0.0, 1e-2, lambda v, d: v + d**2), 1e-2),
    Case(server.Adagrad(0.2, beta1=0.5), algorithm_2(0.2, 0.5, 1e-3, lambda v, d: v + d**2), 1e-3),
    Case(server.Adam(0.05), algorithm_2(0.05, 0.9, 1e-3, lambda v, d: 0.99 * v + 0.01 * d**2), 1e-3),
    Case(
        server.Adam(0.05, 0.8, 0.95, 0.1),
        algorithm_2(0.05, 0.8, 0.1, lambda v, d: 0.95 * v + (1 - 0.95) * d**2),
        0.1,
    ),
    Case(
        server.Yogi(0.05, 0.8, 0.95, 0.1),
        algorithm_2(0.05, 0.8, 0.1, lambda v, d: v - (1 - 0.95) * d**2 * np.sign(v - d**2)),
        0.1,
    ),
    Case(server.Yogi(0.01), algorithm_2(0.01, 0.9, 1e-3, lambda v, d: v - (1 - 0.99) * d**2 * np.sign(v - d**2)), 1e-3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rounds_of_random_targets(case: Case) -> None:
    rng = generator(0, "targets")
    eta = normal(rng, ETA)
    state = case.step.init(eta)
    x = {k: v.numpy().copy() for k, v in eta.items()}
    m = {k: np.zeros_like(v) for k, v in x.items()}
    v = {k: np.full_like(a, case.tau**2) for k, a in x.items()}
    for number in range(ROUNDS):
        delta = {k: 3.0 ** (number % 3 - 1) * d for k, d in normal(rng, ETA).items()}
        eta, state = case.step.step(eta, tree.map(torch.add, eta, delta), state)
        for k in x:
            x[k], m[k], v[k] = case.update(x[k], delta[k].numpy(), m[k], v[k])
        assert close(eta, {k: torch.as_tensor(a) for k, a in x.items()}, 1e-12)


STEPS = [server.Exact(), server.Damped(1.5), *(case.step for case in CASES)]


@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_arguments_are_not_changed(step) -> None:
    eta, target = normal(generator(0, "eta"), ETA), normal(generator(1, "eta"), ETA)
    _, state = step.step(eta, target, step.init(eta))
    before = [{k: v.clone() for k, v in p.items()} for p in (eta, target, state)]
    new, _ = step.step(eta, target, state)
    assert all(equal(a, b) for a, b in zip((eta, target, state), before, strict=True))
    assert not close(new, eta, 1e-6)


@pytest.mark.parametrize("step", [server.Damped(1.0), server.Momentum(1.0, 0.0)], ids=repr)
def test_a_full_step_is_exact(step) -> None:
    rng = generator(0, "full")
    eta = normal(rng, ETA)
    state = step.init(eta)
    for _ in range(ROUNDS):
        target = normal(rng, ETA)
        eta, state = step.step(eta, target, state)
        assert close(eta, target, 1e-12)


def test_damped_is_a_convex_combination() -> None:
    eta, target = normal(generator(0, "eta"), ETA), normal(generator(1, "eta"), ETA)
    new, _ = server.Damped(0.25).step(eta, target, {})
    assert close(new, {k: 0.75 * eta[k] + 0.25 * target[k] for k in eta}, 1e-12)


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi", "fedavgm"])
def test_end_to_end(name: str) -> None:
    """One client and one full-batch step a round: Delta is -lr times the gradient, so the whole run is a plain loop."""
    client = classification_clients((12,), dtype=torch.float64)[0]
    model = fp.models.softmax(4, 3).double()
    made = fp.ALGORITHMS[name](lr=0.3, epochs=1, batch_size=None)
    algorithm = fp.Algorithm(made.prior, made.inference, made.server, Dense("float64"), made.weighting)
    result = fp.run(algorithm, model, [client], rounds=6)
    defaults = {
        "fedadagrad": algorithm_2(0.1, 0.0, 1e-3, lambda v, d: v + d**2),
        "fedadam": algorithm_2(0.01, 0.9, 1e-3, lambda v, d: 0.99 * v + 0.01 * d**2),
        "fedyogi": algorithm_2(0.01, 0.9, 1e-3, lambda v, d: v - 0.01 * d**2 * np.sign(v - d**2)),
        "fedavgm": hsu(1.0, 0.9),
    }
    x = {k: p.detach().numpy().copy() for k, p in model.named_parameters()}
    weight, bias = x
    m = {k: np.zeros_like(v) for k, v in x.items()}
    v = {k: np.full_like(a, 1e-6) for k, a in x.items()}
    data, onehot = client.train.x.numpy(), np.eye(3)[client.train.y.numpy()]
    for _ in range(6):
        logits = data @ x[weight].T + x[bias]
        p = np.exp(logits - logits.max(1, keepdims=True))
        residual = (onehot - p / p.sum(1, keepdims=True)) / len(data)
        delta = {weight: 0.3 * residual.T @ data, bias: 0.3 * residual.sum(0)}
        for k in x:
            x[k], m[k], v[k] = defaults[name](x[k], delta[k], m[k], v[k])
    assert close(result.params, {k: torch.as_tensor(a) for k, a in x.items()}, 1e-9)


def test_full_steps_run_like_exact_em() -> None:
    clients, model = classification_clients((6, 9, 4), dtype=torch.float64), fp.models.mlp(4, (5,), 3).double()

    def params(step) -> fp.Params:
        algorithm = fp.Algorithm(priors.Gaussian(1.0), inference.Point(0.1, 1, 4), step, Dense("float64"))
        return fp.run(algorithm, model, clients, rounds=4, cohort=2).params

    exact = params(server.Exact())
    assert close(params(server.Damped(1.0)), exact, 1e-12)
    assert close(params(server.Momentum(1.0, 0.0)), exact, 1e-12)
    assert not close(params(server.Damped(0.5)), exact, 1e-3)
