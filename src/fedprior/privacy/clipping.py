r"""How much one client can change a sum: its whole message is scaled down to a norm.

    |d|^2 = sum over terms of sum_j (d_j / unit_term)^2         d = difference to what is known before any data
    clip(d) = d min(1, C / |d|)
    C' = C exp(-rate (b - quantile))                            b = the noisy share of clients with |d| <= C

The second line bounds the sensitivity of the sum by C, whatever the prior's statistics are: parameters, gains, gates.
`unit` makes terms of different kinds comparable: gains of a unit are nats, in the tens, and weights move by hundredths.

McMahan et al. 2018, arXiv:1710.06963 (flat clipping); Andrew et al. 2021, arXiv:1905.03871 (the last line).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedprior.core import Params


def norm(message: Params, units: Mapping[str, float]) -> float:
    """|d| of a flat message."""
    squares = (float((v.detach().double() / unit(key, units)).square().sum()) for key, v in message.items())
    return math.sqrt(sum(squares))


def unit(key: str, units: Mapping[str, float]) -> float:
    """Of the term that a flat key begins with."""
    return units.get(key.split("/", 1)[0], 1.0)


def clip(message: Params, most: float, units: Mapping[str, float]) -> tuple[Params, bool]:
    """The message with a norm of at most `most`, and whether it was so before."""
    length = norm(message, units)
    if length <= most:
        return message, True
    factor = most / length * (1 - 1e-6)  # float32 rounds up as well
    return {k: factor * v for k, v in message.items()}, False
