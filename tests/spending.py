"""What a run spends by dp-accounting alone, with the event of a round written out for each kind of sampling."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import dp_accounting as dp
from dp_accounting import pld, rdp

from fedprior.privacy import Privacy

RELATION = dp.NeighboringRelation


def event(sampling: str, accountant: str, z: float, cohort: int, population: int) -> tuple[Any, Any]:
    """A round, and the neighbours."""
    if sampling == "poisson":
        return dp.PoissonSampledDpEvent(cohort / population, dp.GaussianDpEvent(z)), RELATION.ADD_OR_REMOVE_ONE
    if accountant == "pld":
        return dp.TruncatedSubsampledGaussianDpEvent(population, 1.0, cohort, z), RELATION.REPLACE_ONE
    gauss = dp.GaussianDpEvent(z / 2)  # to replace a client moves the sum by 2 C
    one = gauss if cohort == population else dp.SampledWithoutReplacementDpEvent(population, cohort, gauss)
    return one, RELATION.REPLACE_ONE


@functools.cache
def spent(
    privacy: Privacy, z: float, rounds: int, cohort: int, population: int, orders: Sequence[float] | None = None
) -> float:
    """Epsilon after so many rounds of noise z.

    Args:
        privacy: for its delta, sampling and accountant.
        z: noise multiplier.
        rounds: of the run.
        cohort: of a round.
        population: of the run.
        orders: of the Renyi divergences; None for the library's own.
    """
    one, relation = event(privacy.sampling, privacy.accountant, z, cohort, population)
    fresh = rdp.RdpAccountant(orders, relation) if privacy.accountant == "rdp" else pld.PLDAccountant(relation)
    return float(fresh.compose(dp.SelfComposedDpEvent(one, rounds)).get_epsilon(privacy.delta))
