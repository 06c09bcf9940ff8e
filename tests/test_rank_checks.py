"""Ranks: nothing is evaluated twice, and etas that part are noticed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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
