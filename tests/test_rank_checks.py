"""Ranks: nothing is evaluated twice, slow clients are shared out, and etas that part are noticed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fedprior as fp
import rank_calls
from cases import classification_clients, pooled
from fedprior import inference, priors, tree
from fedprior.engines import RankError, TorchRun
from fedprior.metrics import evaluate
from fedprior.objective import Objective

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
CLIENTS = classification_clients((6, 5, 9, 4))


def test_each_example_is_evaluated_on_one_rank(tmp_path: Path) -> None:
    """Sizes that the ranks do not divide, and fewer examples than ranks."""
    objective = Objective(fp.models.mlp(4, (6,), 3))
    for size in (1, 2, 31):
        test = pooled(classification_clients((size,), seed=0))
        whole = evaluate(objective, objective.params(), test)

        def share(rank: int, test: fp.Examples = test) -> dict[str, Any]:
            engine = TorchRun()
            sums = engine.evaluate(objective, objective.params(), test)
            engine.close()
            return {"examples": sums.examples, "totals": dict(sums.totals)}

        for answer in rank_calls.call(3, tmp_path / str(size), share):
            assert answer is not None and answer["value"]["examples"] == whole.examples == size
            assert answer["value"]["totals"] == pytest.approx(dict(whole.totals), rel=1e-5)


@dataclass(frozen=True)
class Slow:
    """Point, on two clients for a while longer."""

    point: inference.Point
    where: tuple[int, ...] = (0, 2)  # equal shares of the first round give both to rank 0

    def start(self, prior: Any, eta: Any) -> Any:
        return self.point.start(prior, eta)

    def e_step(self, objective: Any, prior: Any, eta: Any, client: Any, state: Any, rng: Any) -> Any:
        time.sleep(0.2 * (client.index in self.where))
        q, _ = self.point.e_step(objective, prior, eta, client, None, rng)
        return q, {"rank": torch.tensor(float(os.environ["RANK"]))}


def test_slow_clients_are_dealt_to_different_ranks_once_they_are_known(tmp_path: Path) -> None:
    def places(rank: int, rounds: int) -> list[float]:
        algorithm = fp.Algorithm(priors.Gaussian(), Slow(inference.Point(0.1)), name="slow")
        result = fp.run(algorithm, fp.models.mlp(4, (6,), 3), CLIENTS, rounds=rounds, cohort=4)
        states = [result.store.load(i) for i in range(4)] if rank == 0 else []
        return [float(state["e_step/rank"]) for state in states if state]

    for rounds in (1, 2):
        answer, _ = rank_calls.call(2, tmp_path / str(rounds), lambda rank, n=rounds: places(rank, n))
        assert answer is not None
        where = answer["value"]
        assert len(where) == 4 and (where[0] == where[2]) == (rounds == 1)


@dataclass(frozen=True)
class Drifting(priors.Gaussian):
    """An M-step that rounds otherwise on rank 1."""

    def m_step(self, eta: Any, t: fp.Stats) -> Any:
        moved = 1e-6 * int(os.environ["RANK"])
        return self.Eta(tree.map(lambda v: v + moved, super().m_step(eta, t).mean))


def test_etas_that_part_end_the_run(tmp_path: Path) -> None:
    algorithm = fp.Algorithm(Drifting(), inference.Point(0.1), name="drifting")

    def go(rank: int) -> str:
        return repr(fp.run(algorithm, fp.models.mlp(4, (6,), 3), CLIENTS, rounds=3, cohort=4, out=tmp_path / "run"))

    first, second = rank_calls.call(2, tmp_path, go)
    assert first is not None and second is not None
    assert first["error"] == "ValueError" and "rank 1 has another eta than rank 0" in first["text"]
    assert second["error"] == RankError.__name__
