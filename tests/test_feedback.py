"""Feedback in runs: it mends what top-k breaks, and its state goes with the uploads that are accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import classification_clients, equal
from fedprior import Client, Examples, Params, inference, priors, wire
from fedprior.budget import Budget
from fedprior.codecs import Dense, Sparse, TopK
from fedprior.objective import Objective
from fedprior.store import DiskStore
from stateful import Counting


def beznosikov(client: int) -> Client:
    """Examples whose mean loss is f(x) = <a, x>^2 + |x|^2 / 4, with a = (2, 2, 2) but for a_client = -3."""
    a = torch.full((3,), 2.0, dtype=torch.float64)
    a[client] = -3
    rows = torch.cat([math.sqrt(8) * a[None], math.sqrt(2) * torch.eye(3, dtype=torch.float64)])
    return Client(client, f"client-{client}", Examples(rows, torch.zeros(4, 1, dtype=torch.float64)))


def test_plain_top_1_diverges_where_feedback_converges() -> None:
    """Beznosikov et al. 2020, arXiv:2002.12410, example 1: f_1 + f_2 + f_3 is convex, with its minimum at 0.

    At x = (c, c, c) a client's gradient is c (4.5, 4.5, 4.5) but for -5.5 c in its own coordinate, which is all that
    top-1 sends. The mean of the three steps is + lr 5.5 c / 3 in each coordinate: away from 0, by the same factor every
    round. The gradient of the mean is 7/6 c in each, so that full steps shrink x by 1 - lr 7/6.
    """
    lr, rounds, model = 0.04, 100, nn.Linear(3, 1, bias=False).double()
    nn.init.ones_(model.weight)
    e_step, clients = inference.Point(lr, 1, None), [beznosikov(i) for i in range(3)]

    def run(**fields: Any) -> torch.Tensor:
        made = fp.Algorithm(priors.Gaussian(), e_step, downlink=Dense("float64"), delta=True, **fields)
        return fp.run(made, model, clients, rounds=rounds, loss="regression").params["weight"][0]

    top_1 = TopK(0.3, "float64")
    plain, mended, full = run(codec=top_1), run(codec=top_1, feedback=True), run(codec=Dense("float64"))
    one = torch.ones(3, dtype=torch.float64)
    assert torch.allclose(plain, (1 + lr * 5.5 / 3) ** rounds * one, rtol=1e-9, atol=0)
    assert torch.allclose(full, (1 - lr * 3.5 / 3) ** rounds * one, rtol=1e-9, atol=0)
    assert plain.min() > 1000 and full.max() < 0.01 and mended.abs().max() < 0.1


CLIENTS = classification_clients((6, 5, 7))


@dataclass(frozen=True)
class InTransit:
    """An engine on whose line the payload of client 1 is damaged, in the rounds named."""

    rounds: tuple[int, ...]

    def map_sum(self, work, indices):
        uploads = [work.client(i) for i in indices]
        if work.number in self.rounds:
            uploads[1] = replace(uploads[1], payload=uploads[1].payload[:-1])
        received = [stats for stats in map(work.receive, uploads) if stats is not None]
        return sum(received[1:], received[0])


def personal(**fields: Any) -> fp.Algorithm:
    fields = {"codec": TopK(0.2), "delta": True, "feedback": True, "weighting": "examples"} | fields
    return fp.Algorithm(priors.Gaussian(), Counting(inference.Point(0.1, 1, 4)), downlink=Dense(), **fields)


def states(folder: Path, **fields: Any) -> list[Params]:
    fp.run(personal(), fp.models.mlp(4, (6,), 3), CLIENTS, out=folder, **fields)
    loaded = [DiskStore(folder / "clients").load(i) for i in range(len(CLIENTS))]
    return [state for state in loaded if state is not None]


def test_a_residual_lives_beside_the_state_of_the_e_step(tmp_path: Path) -> None:
    for state in states(tmp_path, rounds=3):
        residual = wire.part(state, "residual")
        assert wire.part(state, "e_step") == {"rounds": 3} and residual is not None
        assert set(residual) == {f"phi/{k}" for k in Objective(fp.models.mlp(4, (6,), 3)).params()}
        for name, value in residual.items():  # vectors are sent whole, and weighted: what is left is a rounding
            assert (float(value.abs().max()) > 1e-3) == name.endswith("weight")
        again = wire.join({"e_step": wire.part(state, "e_step"), "residual": residual})
        assert equal(again, state)
    assert wire.part({"e_step/rounds": torch.ones(1)}, "residual") is None and wire.join({"e_step": None}) == {}


def test_a_refused_upload_leaves_the_personal_state_as_it_was(tmp_path: Path) -> None:
    """Whether or not the client could have known; the states of the others go on."""
    before = states(tmp_path / "one", rounds=1)
    after = states(tmp_path / "two", rounds=2, engine=InTransit((2,)))
    whole = states(tmp_path / "whole", rounds=2)
    assert [equal(a, b) for a, b in zip(after, before, strict=True)] == [False, True, False]
    assert [equal(a, b) for a, b in zip(after, whole, strict=True)] == [True, False, True]
    assert len(states(tmp_path / "none", rounds=1, engine=InTransit((1,)))) == 2


def test_a_client_that_cannot_decode_its_own_payload_is_refused(tmp_path: Path) -> None:
    """NaN in the data, with feedback: the server says why, and there is no state."""
    x = CLIENTS[1].train.x.clone()
    x[0, 0] = math.nan
    sick = [CLIENTS[0], Client(1, "sick", Examples(x, CLIENTS[1].train.y)), CLIENTS[2]]
    result = fp.run(personal(), fp.models.mlp(4, (6,), 3), sick, rounds=2, out=tmp_path)
    assert [c.client for r in result.history for c in r.lost()] == ["sick", "sick"]
    assert DiskStore(tmp_path / "clients").load(1) is None


WRONG = [
    ({"codec": TopK(0.1)}, "downlink=Dense"),
    ({"codec": TopK(0.1), "downlink": Dense()}, "delta=True"),
    ({"downlink": TopK(0.1), "delta": True}, "downlink=Dense"),
    ({"feedback": True}, "delta=True as well"),
    ({"feedback": True, "delta": True, "prior": priors.SpikeSlab(0.1)}, "SpikeSlab are over the clients whose gates"),
    ({"feedback": True, "delta": True, "prior": priors.Dropout()}, "Dropout are over the clients whose gates"),
    ({"feedback": True, "delta": True, "prior": priors.SharedGates(0.5)}, "SharedGates removes units"),
    ({"feedback": True, "delta": True, "prior": priors.GroupLasso(0.1)}, "GroupLasso removes units"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_combinations_that_would_train_nothing_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.Algorithm(**{"prior": priors.Gaussian(), "inference": inference.Point(0.1)} | more)
    with pytest.raises(TypeError, match=r"downlink=.*is not a Codec"):
        fp.Algorithm(priors.Gaussian(), inference.Point(0.1), downlink=Dense)  # type: ignore[arg-type]


def test_the_wire_is_part_of_an_algorithms_identity() -> None:
    """So that a run is not resumed with another one."""
    base = replace(fp.topk(), feedback=False)
    more = (
        {"feedback": True},
        {"downlink": Sparse()},
        {"codec": TopK(0.2)},
        {"budget": Budget(1)},
        {"budget": Budget(2)},
    )
    others = [replace(base, **f) for f in more]
    plain = replace(fp.fedavg(), name="topk")
    assert len({str(a) for a in (base, *others, plain, replace(plain, delta=True))}) == 8
