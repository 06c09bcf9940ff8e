r"""What a budget of bytes affords: a density and a value type.

    spend(density) = cohort * sum_t bytes_per_entry * live_t          both directions, t = 1 .. rounds

`live_t` are the prior's schedule of parameters, and bytes_per_entry is measured: the lengths of the first round's
payloads, encoded as they will be, over the entries in them. The plan is the largest density whose spend is at most
0.95 of the budget, with the first value type at which that density is at least 0.02, else with the last one. What the
plan cannot know, how well an entropy coder does later, the run watches (budget.py).

No density is below that of one unit of each group with all layers that have no units (selection.least).
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any, cast

from fedprior import selection, tree, wire
from fedprior.algorithm import Algorithm
from fedprior.core import Params

_SHARE, _ENOUGH = 0.95, 0.02


def plan(algorithm: Algorithm, params: Params, rounds: int, cohort: int) -> Algorithm:
    """The algorithm with a density and a codec that its budget affords, and with a schedule for its rounds.

    Args:
        algorithm: bound to the model.
        params: the model's.
        rounds: of the whole run.
        cohort: clients a round.

    Raises:
        ValueError: if not even the smallest model fits the budget, or it exceeds the density.
    """
    prior: Any = algorithm.prior
    if not hasattr(prior, "scheduled"):
        return algorithm
    if prior.density is not None:
        _check_density(prior, params)
        return replace(algorithm, prior=prior.scheduled(rounds))
    if algorithm.budget is None:
        raise ValueError("a density of None is planned from a budget: write density=..., or Algorithm(budget=...)")
    best, codec = None, cast(Any, algorithm.codec)
    for value_type in algorithm.budget.value_types:
        tried = replace(algorithm, codec=replace(codec, value_type=value_type), delta=value_type.startswith("int"))
        best = _largest(tried, params, rounds, cohort)
        if best is not None and cast(Any, best.prior).density >= _ENOUGH:
            return best
    if best is None:
        least = _spend(_with(algorithm, _least(prior, params), rounds), params, rounds, cohort) / _SHARE / 1e6
        raise ValueError(
            f"budget_mb={algorithm.budget.mb:g} is too small for {rounds} rounds of {cohort} clients: the smallest "
            f"model needs {least:.2f} MB. Give more, or fewer rounds, or a smaller cohort"
        )
    return best


def _largest(algorithm: Algorithm, params: Params, rounds: int, cohort: int) -> Algorithm | None:
    """The largest density that fits, to 1 %, or None."""
    assert algorithm.budget is not None
    allowed = _SHARE * algorithm.budget.mb * 1e6

    def fits(density: float) -> bool:
        return _spend(_with(algorithm, density, rounds), params, rounds, cohort) <= allowed

    low, high = _least(algorithm.prior, params), 1.0
    if not fits(low):
        return None
    if fits(high):
        return _with(algorithm, high, rounds)
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if fits(middle) else (low, middle)
    return _with(algorithm, low, rounds)


def _least(prior: Any, params: Params) -> float:
    """The smallest density there is."""
    total = tree.size({name: params[name] for name in prior.counted})
    return selection.least(prior.groups, params, prior.counted) / total


def _check_density(prior: Any, params: Params) -> None:
    least = _least(prior, params)
    if prior.density < least:
        raise ValueError(
            f"density={prior.density:g} cannot be reached: one unit of each group and all layers without units hold "
            f"{least:.2%} of the parameters. Ask for density >= {ceil(1e6 * least) / 1e6:g}, or take a model "
            "with more units"
        )


def _with(algorithm: Algorithm, density: float, rounds: int) -> Algorithm:
    prior: Any = algorithm.prior
    return replace(algorithm, prior=replace(prior, density=density).scheduled(rounds))


def _spend(algorithm: Algorithm, params: Params, rounds: int, cohort: int) -> float:
    """Bytes of a whole run, both directions."""
    prior: Any = algorithm.prior
    eta = prior.init(params)
    down = len(wire.encode_eta(algorithm, eta))
    message = algorithm.message(eta, algorithm.inference.start(prior, eta))
    up = len(algorithm.codec.encode(wire.flat(message), 1.0))
    live = prior.schedule(eta, rounds)
    return cohort * (down + up) * sum(live) / live[0]
