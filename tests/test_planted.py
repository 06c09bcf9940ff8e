"""Mistakes that are easily made with samples, prior means, few bits and rules: a closed form fails with each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import laws
import test_distilled as distilled
import test_rules as rules
from fedprior import inference, penalties, priors, rounding, tree
from fedprior.inference import bregman, langevin

Wrong = Callable[[Any], Any]


def twice(f: Any) -> Any:
    return lambda *a, **k: 2 * f(*a, **k)


MISTAKES: dict[str, tuple[Any, str, Wrong, Callable[[], None]]] = {
    "gradients of sums": (
        bregman,
        "slopes",
        lambda f: lambda o, phi, b: (tree.map(lambda g: len(b) * g, f(o, phi, b)[0]), f(o, phi, b)[1]),
        lambda: distilled.test_prior_means_of_a_quadratic("gradient"),
    ),
    "memory the wrong way": (
        inference.Bregman,
        "_prior_mean",
        lambda f: lambda s, o, w, last, theta, b: f(s, o, w, theta, last, b),
        lambda: distilled.test_prior_means_of_a_quadratic("memory"),
    ),
    "the client's w for its theta": (
        inference.Bregman,
        "_train",
        lambda f: lambda *a: f(*a)[::-1],
        distilled.test_without_memory_it_is_pfedme,
    ),
    "noise of twice the temperature": (
        langevin,
        "walk",
        lambda f: lambda *a, temperature: f(*a, temperature=2 * temperature),
        lambda: distilled.test_langevin_has_the_posteriors_moments(1.0),
    ),
    "a student at twice its rate": (
        langevin,
        "Descent",
        lambda f: lambda trained, lr: f(trained, 2 * lr),
        distilled.test_a_student_learns_the_teachers_predictions,
    ),
    "a grid of one bit more": (
        rounding,
        "step_of",
        lambda f: lambda value, bits: f(value, bits + 1),
        lambda: distilled.test_rounded_values_lie_on_the_grid(2),
    ),
    "noise as wide as two steps": (
        inference.Rough,
        "rough",
        lambda f: lambda s, o, phi, rng: {k: 2 * v - phi[k] for k, v in f(s, o, phi, rng).items()},
        distilled.test_rough_weights,
    ),
    "kurtosis twice": (penalties.Kurtosis, "__call__", twice, distilled.test_kurtosis_and_similarity),
    "similarity twice": (penalties.Similarity, "__call__", twice, distilled.test_kurtosis_and_similarity),
    "a posterior without the pull": (
        inference.Rules,
        "e_step",
        lambda f: lambda s, *a: f(replace(s, pull=0.0), *a),
        lambda: rules.test_q_is_the_posterior_over_all_pairs_of_rules(1.5),
    ),
    "a mean of counts for their sum": (
        priors.Rules,
        "m_step",
        lambda f: lambda s, e, t: f(s, e, t.weighted(1 / t.clients)),
        rules.test_the_m_step_is_relative_counts_and_only_counts_travel,
    ),
    "counts of clients twice": (
        priors.Rules,
        "stats",
        lambda f: lambda s, q: f(s, q).weighted(2),
        rules.test_the_m_step_is_relative_counts_and_only_counts_travel,
    ),
    "a generator that knows no orders": (
        priors.Rules,
        "point",
        lambda f: lambda s, e: {k: v.sqrt() / v.sqrt().sum(1, keepdim=True) for k, v in f(s, e).items()},
        lambda: rules.test_the_generator_is_that_of_literals_drawn_one_by_one(2),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_closed_form_catches_the_mistake(mistake: str) -> None:
    laws.caught(*MISTAKES[mistake])
