"""How secure aggregation is asked for: Algorithm(secure=SecureSum(bound=...)). sealed.py does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_USUAL = 4.0


@dataclass(frozen=True)
class SecureSum:
    """The server sees the sum over a round's clients alone (secure.py), of values in fixed point (fixed_point.py).

    Clients send what they have as the difference to what is known before any data were seen, weighted; the codec's
    bytes go downwards alone.

    Attributes:
        bound: the largest change of an entry before its weight, for all terms or by term: {"phi": 1.0, "gain": 1e4}.
            Terms that are not named have what the prior says of them (its `bounds`); with None all have, else 4. What
            is beyond is cut off; the records say how many clients had such a value.
        bits: of an entry on the wire, 16, 32 or 64. A step of 16 is a 1,600th of the bound or more for a cohort of ten:
            terms of which most entries are far smaller (the prior's `bounds` and `precise`) need 32, or a `bound`.
        most: the largest weight; clients with more examples count as this many. Needed with weighting="examples".
    """

    bound: float | Mapping[str, float] | None = None
    bits: int = 32
    most: float = 1.0

    def __post_init__(self) -> None:
        bound = _USUAL if self.bound is None else self.bound
        values = list(bound.values()) if isinstance(bound, Mapping) else [bound]
        if not values or not all(0 < v < math.inf for v in [*values, self.most]):
            raise ValueError(f"SecureSum needs finite bound > 0 and most > 0, got {self.bound} and {self.most}")

    def bound_of(self, term: str, prior: Any) -> float:
        """Of the entries of one term of a prior's, before their weight."""
        if isinstance(self.bound, float | int):
            return self.bound
        known = {**getattr(prior, "bounds", {}), **(self.bound or {})}
        if self.bound and term not in known:
            raise ValueError(
                f"SecureSum(bound=...) has no bound for the term {term!r}, only for {', '.join(self.bound)}: add one"
            )
        return known.get(term, _USUAL)


def check(algorithm: Any) -> None:
    """Refuse what needs to see single uploads.

    Args:
        algorithm: an Algorithm with `secure`.
    """
    secure, prior, codec = algorithm.secure, type(algorithm.prior).__name__, algorithm.codec
    if algorithm.individual:
        raise ValueError(
            f"{prior} needs each client's upload by itself, and secure aggregation shows the server their sum alone: "
            "leave secure=... out, or use a prior whose statistics are summed as they come"
        )
    if algorithm.feedback or hasattr(codec, "fraction"):
        raise ValueError(
            "under secure=SecureSum(...) all clients send the same entries, and none is sent late: "
            "leave TopK and feedback=True out, and use codec=Dense()"
        )
    if getattr(codec, "value_type", "float32") not in ("float32", "float64"):
        raise ValueError(
            f"codec={codec} rounds, and under secure=SecureSum(...) uploads are fixed-point integers: write "
            f"codec=Dense(), downlink={codec} and SecureSum(bits=...)"
        )
    if wide := _wide(algorithm):
        raise ValueError(
            f"16 bits round most entries of {' and '.join(wide)} of {prior} to zero, as a few are far larger than the "
            "others: write SecureSum(bits=32), or SecureSum(bound={...}) with a smaller bound for each of them"
        )
    if algorithm.budget is not None:
        raise ValueError("budget=... plans the codec's bytes, and secure=SecureSum(...) sends others: leave one out")
    if algorithm.weighting == "examples" and secure.most == 1:
        raise ValueError(
            "weighting='examples' hides each client's number of examples under secure=SecureSum(...): write most=..., "
            "the largest number that a client may count for ([secure] of a TOML file), or weighting='uniform' "
            "(--weighting uniform)"
        )


def _wide(algorithm: Any) -> list[str]:
    """The terms that 16 bits are too few for; none under privacy, whose clip is the bound."""
    secure, prior = algorithm.secure, algorithm.prior
    if secure.bits != 16 or algorithm.privacy is not None or isinstance(secure.bound, float | int):
        return []
    told = {*getattr(prior, "bounds", {}), *getattr(prior, "precise", ())} - {*(secure.bound or {})}
    return [term for term in prior.uplink if term in told]
