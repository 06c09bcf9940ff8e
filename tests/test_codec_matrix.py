"""Every algorithm with every lossy codec: it is refused where it is made, or it learns something finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

import fedprior as fp
from cases import classification_clients, equal, redraw
from fedprior import inference, priors, tree
from fedprior.codecs import Dense, Sparse, TopK
from fedprior.engines import Sequential

CLIENTS = classification_clients((14, 9, 11))
MODEL = fp.models.mlp(4, (8,), 3)
NORMED = redraw(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()).float()
NEEDS = {"fednsl": fp.models.rules(4, 3), "fedbn": NORMED}
GIVEN: dict[str, dict[str, Any]] = {"fedsparse": {"density": 0.5}, "fedsparsemixture": {"density": 0.5}}
SMALL = {"fola", "laplace", "horseshoe"}  # their M-steps divide by precisions, large ones and small ones in one tensor
CODECS = {
    "int8": {"codec": Dense("int8"), "downlink": None},
    "int4": {"codec": Sparse("int4", "zlib"), "downlink": Dense("int8")},
    "int2": {"codec": Dense("int2"), "downlink": Dense("int8")},
    "topk": {"codec": TopK(0.2), "downlink": Dense()},
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", [name for name in fp.ALGORITHMS if name != "local"])  # which sends nothing
def test_an_algorithm_learns_through_a_codec_or_refuses_it(name: str, codec: str) -> None:
    fields: dict[str, Any] = CODECS[codec] | {"delta": True, "feedback": False}
    algorithm, model = fp.ALGORITHMS[name](**GIVEN.get(name, {})), NEEDS.get(name, MODEL)
    if name in SMALL:
        with pytest.raises(ValueError, match=r"sets small values to zero.* write codec=Dense\(\)"):
            replace(algorithm, **fields)
        return
    result = fp.run(replace(algorithm, **fields), model, CLIENTS, rounds=2, engine=Sequential(1), progress=False)
    assert tree.finite(tree.flatten(result.eta).values())
    assert {c.status for r in result.history for c in r.clients} == {"ok"}
    assert not all(r.kept_eta for r in result.history)
    assert not equal(result.params, result.objective.params())


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("codec", [Dense("bfloat16", "zlib"), Sparse(), TopK(1.0)], ids=repr)
def test_codecs_that_keep_small_values_are_taken(name: str, codec: Any) -> None:
    algorithm = replace(fp.ALGORITHMS[name](), codec=codec, downlink=Dense(), delta=True)
    result = fp.run(algorithm, MODEL, CLIENTS, rounds=2, engine=Sequential(1), progress=False)
    assert tree.finite(tree.flatten(result.eta).values()) and not any(r.kept_eta for r in result.history)


def test_what_is_refused_is_what_travels() -> None:
    """FOLA's server sends precisions, and a scale mixture's does not; a mixture's parts are those of its prior."""
    rounded: dict[str, Any] = {"codec": Dense(), "downlink": Dense("int8")}
    assert replace(fp.laplace(), **rounded).downlink == Dense("int8")
    with pytest.raises(ValueError, match=r"downlink=Dense.* sums of precision, .* write downlink=Dense"):
        replace(fp.fola(), **rounded)
    with pytest.raises(ValueError, match="sums of part0_a and part0_a_phi and part1_a"):
        fp.Algorithm(priors.Mixture(2, priors.OnlineLaplace()), inference.Point(0.1), codec=Dense("int8"), delta=True)
