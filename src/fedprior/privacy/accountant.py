r"""What a run has spent: epsilon after a number of rounds, for a noise multiplier z = sigma / C.

    sampling    a round's clients                neighbours: two populations that    sensitivity    event
    fixed       a cohort, without replacement    differ in the data of one client    2 C            Gaussian z / 2
    poisson     each one with probability q      differ by one client, there or not  C              Gaussian z

Epsilons of the two rows mean different things: to replace a client is to remove one and to add one.
Rounds compose by Renyi divergences (RDP), or by privacy loss distributions (PLD, tighter; Poisson alone).
dp-accounting gives the numbers.                                                             Extra: privacy.

Wang, Balle, Kasiviswanathan 2019, arXiv:1808.00087 (without replacement); Mironov, Talwar, Zhang 2019,
arXiv:1908.10530 (Poisson); Koskela et al. 2020, arXiv:1906.03049 (PLD).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedprior.privacy.dp import Privacy

ORDERS = [*range(2, 65), 80, 96, 128, 192, 256, 512]


def _library() -> Any:
    try:
        import dp_accounting
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("accounting needs dp-accounting: pip install 'fedprior[privacy]'") from error
    return dp_accounting


def event(privacy: Privacy, noise_multiplier: float) -> Any:
    """One round, as dp-accounting describes it."""
    dp, q = _library(), privacy.cohort / privacy.population
    if privacy.sampling == "poisson":
        gauss = dp.GaussianDpEvent(noise_multiplier)
        return gauss if q == 1 else dp.PoissonSampledDpEvent(q, gauss)
    gauss = dp.GaussianDpEvent(noise_multiplier / 2)
    return gauss if q == 1 else dp.SampledWithoutReplacementDpEvent(privacy.population, privacy.cohort, gauss)


def accountant(privacy: Privacy) -> Any:
    """A fresh one."""
    dp = _library()
    relation = dp.NeighboringRelation
    if privacy.accountant == "pld":
        from dp_accounting import pld

        return pld.PLDAccountant(neighboring_relation=relation.ADD_OR_REMOVE_ONE)
    from dp_accounting import rdp

    poisson = privacy.sampling == "poisson"
    return rdp.RdpAccountant(ORDERS, relation.ADD_OR_REMOVE_ONE if poisson else relation.REPLACE_ONE)


@functools.lru_cache(maxsize=4096)
def epsilon(privacy: Privacy, rounds: int) -> float:
    """After so many rounds, at privacy.delta; infinite without noise.

    Args:
        privacy: with its noise multiplier, cohort and population.
        rounds: at least 1.
    """
    if not privacy.noise_multiplier:
        return math.inf
    composed = _library().SelfComposedDpEvent(event(privacy, privacy.noise_multiplier), rounds)
    return float(accountant(privacy).compose(composed).get_epsilon(privacy.delta))


def noise_for(privacy: Privacy, rounds: int) -> float:
    """The least noise multiplier (to 1 %) with which so many rounds stay within privacy.target_epsilon."""
    dp = _library()
    return float(
        dp.calibrate_dp_mechanism(
            lambda: accountant(privacy),
            lambda z: dp.SelfComposedDpEvent(event(privacy, z), rounds),
            privacy.target_epsilon,
            privacy.delta,
            dp.LowerEndpointAndGuess(1e-3, 1.0),
            tol=1e-3,
        )
    )
