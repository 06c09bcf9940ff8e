"""What a Split or a Mixture tells of the terms and fields of its parts: what each part tells of its own."""

from __future__ import annotations

from typing import Any

import pytest

import fedprior as fp
from cases import PRIORS, Case
from fedprior import inference, priors
from fedprior.codecs import Dense
from fedprior.privacy import SecureSum

NAMES = ("exact", "precise", "precise_eta")
FIRST = priors.Gaussian(2.0)


def composed(prior: Any) -> list[tuple[Any, list[Any]]]:
    """Priors made of this one, and their parts."""
    found: list[tuple[Any, list[Any]]] = [
        (priors.Split({"more.*": FIRST, "*": prior}), [FIRST, prior]),
        (priors.Split({"more.*": prior, "*": FIRST}), [prior, FIRST]),
    ]
    if not any(hasattr(prior, method) for method in priors.Mixture.no_place):
        found.append((priors.Mixture(2, prior), [prior, prior]))
    return found


@pytest.mark.parametrize("case", PRIORS, ids=lambda c: c.name)
def test_each_part_is_told_of(case: Case) -> None:
    for whole, parts in composed(case.prior):
        for name in NAMES:
            want = [f"part{i}_{of}" for i, part in enumerate(parts) for of in getattr(part, name, ())]
            assert [of for of in getattr(whole, name) if of.startswith("part")] == want
        for i, part in enumerate(parts):
            for term in part.uplink:
                assert SecureSum().bound_of(f"part{i}_{term}", whole) == SecureSum().bound_of(term, part)


def test_the_table_has_parts_with_each_attribute() -> None:
    for name in (*NAMES, "bounds"):
        assert any(getattr(case.prior, name, ()) for case in PRIORS)


@pytest.mark.parametrize("case", [c for c in PRIORS if hasattr(c.prior, "precise")], ids=lambda c: c.name)
@pytest.mark.parametrize("side", ["codec", "downlink"])
def test_codecs_that_a_part_refuses_are_refused(case: Case, side: str) -> None:
    """Of the terms that travel up, or of the fields that travel down."""
    names = case.prior.precise if side == "codec" else getattr(case.prior, "precise_eta", ())
    for whole, parts in composed(case.prior):
        codecs: dict[str, Any] = {"codec": Dense(), "downlink": Dense(), "delta": True} | {side: Dense("int4")}
        if not names:
            assert fp.Algorithm(whole, inference.Point(0.1), **codecs).delta
            continue
        want = " and ".join(f"part{i}_{name}" for i, part in enumerate(parts) if part is case.prior for name in names)
        with pytest.raises(ValueError, match=f"{side}=Dense.* sums of {want}, which must arrive"):
            fp.Algorithm(whole, inference.Point(0.1), **codecs)
