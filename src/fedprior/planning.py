r"""What a budget of bytes affords: a density and a value type.

    spend(density) = cohort * sum_t bytes(live_t)          both directions, t = 1 .. rounds

`live_t` is the prior's schedule of parameters. bytes(live) is measured on models of the first, the middle and the last
number of parameters, encoded as they will be, and linear in between: some bytes (masks, biases, gains) go with the
units, not with the parameters. The plan is the largest density whose spend is at most 0.95 of the budget, with the
first value type at which that density is at least 0.02, else with the last one. What the plan cannot know, how well an
entropy coder does later, the run watches (budget.py), with what is `known` of the next round.

No density is below that of one unit of each group with all layers that have no units (selection.least).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedprior import posteriors, selection, wire
from fedprior.algorithm import Algorithm
from fedprior.codecs import Dense, Sparse, TopK, schema_of
from fedprior.codecs.entropy import longest_coded
from fedprior.core import Eta, Params, Schema
from fedprior.objective import Objective
from fedprior.rng import generator

_SHARE, _ENOUGH = 0.95, 0.02


def prepare(
    algorithm: Algorithm, objective: Objective, x: Tensor, rounds: int, cohort: int
) -> tuple[Algorithm, Eta, Schema]:
    """The algorithm as it runs, its first eta, and the schema of what every client uploads.

    Args:
        algorithm: as the user wrote it.
        objective: the model and its loss.
        x: one input, shape (1, ...).
        rounds: of the whole run.
        cohort: clients a round.
    """
    algorithm = plan(algorithm.bind(objective.model, x), objective.params(), rounds, cohort)
    eta, server = algorithm.start(objective.params())
    first = algorithm.message(eta, algorithm.inference.start(algorithm.prior, eta))
    algorithm.m_step(eta, algorithm.accept(eta, first), server)  # what it reads and the message lacks shows here
    return algorithm, eta, schema_of(wire.flat(first))


def plan(algorithm: Algorithm, params: Params, rounds: int, cohort: int) -> Algorithm:
    """The algorithm with a density and a codec that its budget affords, and with a schedule for its rounds.

    Args:
        algorithm: bound to the model.
        params: the model's.
        rounds: of the whole run.
        cohort: clients a round.

    Raises:
        ValueError: if not even the smallest model fits, or not even one round, or a density cannot be reached.
    """
    prior: Any = algorithm.prior
    if hasattr(prior, "scheduled") and prior.density is None:
        return _affordable(algorithm, params, rounds, cohort)
    if hasattr(prior, "scheduled"):
        _check_density(prior)
    planned = replace(algorithm, prior=prior.scheduled(rounds)) if hasattr(prior, "scheduled") else algorithm
    if planned.budget is not None:
        eta = planned.sample(planned.start(params)[0], generator(0, "plan"))
        once = cohort * _bytes(planned, eta, planned.inference.start(planned.prior, eta))
        if once > planned.budget.mb * 1e6:
            raise ValueError(_too_small(planned, f"one round of {cohort} clients", "one needs", once))
    return planned


def known(algorithm: Algorithm, eta: Eta) -> tuple[int | None, int | None]:
    """What is known of the next round's payloads: bytes of a client's broadcast, and the most that it can send.

    None where the broadcast is another for each client, and where only the client knows how much it sends. Of the parts
    of a model that clients are sent, none is longer than another.
    """
    down = None if algorithm.samples else len(wire.encode_eta(algorithm, eta))
    sent = algorithm.sample(eta, generator(0, "plan"))
    codec, full = algorithm.codec, getattr(algorithm.prior, "full", None)
    if isinstance(codec, Sparse) and full is not None:
        q = full(sent)
    elif isinstance(codec, Dense | TopK):
        q = algorithm.inference.start(algorithm.prior, sent)
    else:
        return down, None
    message = wire.flat(algorithm.message(sent, q))
    if isinstance(codec, TopK):
        return down, codec.longest(schema_of(message))
    plain = replace(codec, entropy="none").encode(message, 1.0)
    return down, longest_coded(codec.entropy, len(plain))


def _affordable(algorithm: Algorithm, params: Params, rounds: int, cohort: int) -> Algorithm:
    """A density and a codec for a prior that has none."""
    if algorithm.budget is None:
        raise ValueError("a density of None is planned from a budget: write density=..., or Algorithm(budget=...)")
    best, tried, codec = None, algorithm, cast(Any, algorithm.codec)
    for value_type in algorithm.budget.value_types or (codec.value_type,):
        tried = replace(algorithm, **wire.chain(codec, value_type))
        best = _largest(tried, params, rounds, cohort)
        if best is not None and cast(Any, best.prior).density >= _ENOUGH:
            return best
    if best is None:
        least = _spend(_with(tried, _least(algorithm.prior), rounds), params, rounds, cohort) / _SHARE
        what = f"{rounds} rounds of {cohort} clients"
        raise ValueError(_too_small(algorithm, what, "the smallest model needs", least))
    return best


def _too_small(algorithm: Algorithm, what: str, needs: str, least: float) -> str:
    assert algorithm.budget is not None
    unit = 10 ** (math.floor(math.log10(least)) - 2)
    enough = math.ceil(least / unit) * unit / 1e6  # three digits, rounded up
    return (
        f"budget_mb={algorithm.budget.mb:g} is too small for {what}: {needs} {enough:.4g} MB. "
        "Give more, or fewer rounds, or a smaller cohort"
    )


def _largest(algorithm: Algorithm, params: Params, rounds: int, cohort: int) -> Algorithm | None:
    """The largest density that fits, to 1 %, or None."""
    assert algorithm.budget is not None
    allowed = _SHARE * algorithm.budget.mb * 1e6

    def fits(density: float) -> bool:
        return _spend(_with(algorithm, density, rounds), params, rounds, cohort) <= allowed

    low, high = _least(algorithm.prior), cast(Any, algorithm.prior).start or 1.0
    if not fits(low):
        return None
    if fits(high):
        return _with(algorithm, high, rounds)
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if fits(middle) else (low, middle)
    return _with(algorithm, low, rounds)


def _least(prior: Any) -> float:
    """The smallest density there is."""
    return selection.least(prior.groups, prior.counted) / sum(map(math.prod, prior.counted.values()))


def _check_density(prior: Any) -> None:
    least = _least(prior)
    if prior.density < least:
        raise ValueError(
            f"density={prior.density:g} cannot be reached: one unit of each group and all layers without units hold "
            f"{least:.2%} of the parameters, most in {_largest_layers(prior)}. Ask for density >= "
            f"{math.ceil(1e6 * least) / 1e6:g}, or take a model with more units"
        )


def _largest_layers(prior: Any) -> str:
    """The three layers that hold the most in the smallest model, with their shares of all parameters."""
    held: dict[str, int] = {}
    for name, entries in selection.smallest(prior.groups, prior.counted).entries.items():
        layer = name.rpartition(".")[0] or name
        held[layer] = held.get(layer, 0) + entries
    total = sum(map(math.prod, prior.counted.values()))
    largest = sorted(held, key=lambda layer: -held[layer])[:3]
    return ", ".join(f"{layer} ({held[layer] / total:.1%})" for layer in largest)


def _with(algorithm: Algorithm, density: float, rounds: int) -> Algorithm:
    prior: Any = algorithm.prior
    return replace(algorithm, prior=replace(prior, density=density).scheduled(rounds))


def _spend(algorithm: Algorithm, params: Params, rounds: int, cohort: int) -> float:
    """Bytes of a whole run, both directions."""
    prior: Any = algorithm.prior
    live, measured = prior.schedule(params, rounds), {}
    params = {name: _as_later(name, value) for name, value in params.items()}
    for wanted in (live[-1], (live[0] * live[-1]) ** 0.5, live[0]):
        eta = prior.supposed(params, wanted)
        measured[prior.live(eta)] = _bytes(algorithm, eta, posteriors.Gains(eta.mean, eta.gain))
    return cohort * float(np.interp(live, list(measured), list(measured.values())).sum())


def _as_later(name: str, value: Tensor) -> Tensor:
    """Values that differ, as they will in training: equal ones, such as a new norm's, are sent as one."""
    if value.numel() < 2 or bool((value != value.flatten()[0]).any()):
        return value
    noise = torch.randn(value.shape, generator=generator(0, "plan", name), dtype=value.dtype)
    return value + noise.to(value.device)


def _bytes(algorithm: Algorithm, eta: Eta, q: Any) -> int:
    """Both directions of one client."""
    up = algorithm.codec.encode(wire.flat(algorithm.message(eta, q)), 1.0)
    return len(wire.encode_eta(algorithm, eta)) + len(up)
