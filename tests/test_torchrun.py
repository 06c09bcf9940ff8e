"""Ranks: the results of one process, whoever does what; and when one dies, all end and say which."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedprior as fp
import rank_calls
from cases import classification_clients, close, pooled, without_seconds
from fedprior import Availability, codecs, inference, priors, records, tree
from fedprior.engines import RankError, Sequential, TorchRun
from stateful import Counting

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
CLIENTS = classification_clients((6, 5, 9, 4, 7, 8))
APART = [replace(client, index=10 * client.index + 3) for client in CLIENTS]  # indices are not positions
MODEL = fp.models.mlp(4, (6,), 3)
TEST = pooled(classification_clients((30,), seed=0))
ROUNDS = 4
ALGORITHMS = [
    fp.fedavg(0.1),
    fp.fedadam(0.1),
    fp.feddropout(0.1),
    fp.grouplasso(0.1, strength=0.06),
    fp.fedsparse(0.1, density=0.5),
    fp.fedsparse(0.1, lambda_0=0.3, gate_lr=0.4),
    fp.fedsparsemixture(0.1, density=0.5),
    fp.pfedvem(0.1),
    fp.fedpop(0.1, epochs=3, burn_in=1),
    replace(fp.topk(0.1, 0.5), name="topk: personal residuals"),
    fp.Algorithm(priors.Gaussian(0.1), Counting(inference.Point(0.1)), delta=True, name="counting"),
]


@dataclass(frozen=True)
class Damaged:
    """A codec whose payloads are torn on their way from clients of weight nine."""

    codec: Any

    def encode(self, message: fp.Params, clients: float) -> bytes:
        payload = self.codec.encode(message, clients)
        return payload[:-1] if clients == 9.0 else payload

    def decode(self, payload: bytes, schema: Any) -> tuple[fp.Params, float]:
        return self.codec.decode(payload, schema)


def run(algorithm: fp.Algorithm = ALGORITHMS[0], **fields: Any) -> fp.Result:
    given = {"cohort": 4, "test": TEST, "clients": APART, "model": MODEL, "rounds": ROUNDS, "evaluate_every": 2}
    return fp.run(algorithm, **(given | {"availability": Availability(dropout=0.2)} | fields))


def told(result: fp.Result) -> dict[str, Any]:
    """A result as JSON; floats keep their bits."""
    eta = {k: v.double().tolist() for k, v in tree.flatten(result.eta).items()}
    return {"eta": eta, "history": [r.to_json() for r in without_seconds(result.history)]}


def eta_of(told: dict[str, Any]) -> fp.Params:
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in told["eta"].items()}


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> bool:
    """Equal records, and etas and metrics within the tolerance."""
    a, b = ([fp.Round.from_json(line) for line in told["history"]] for told in (one, other))
    metrics = all(x.metrics == pytest.approx(y.metrics, rel=tolerance) for x, y in zip(a, b, strict=True))
    rows = [[replace(r, metrics={}) for r in history] for history in (a, b)]
    return rows[0] == rows[1] and metrics and close(eta_of(one), eta_of(other), tolerance)


def on(count: int, folder: Path, function: Callable[[], fp.Result]) -> dict[str, Any]:
    """What all ranks give, which is the same."""
    given = rank_calls.call(count, folder, lambda rank: told(function()))
    assert all(answer is not None and "value" in answer for answer in given), given
    first, *others = (answer["value"] for answer in given if answer is not None)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_ranks_agree_with_one_process(algorithm: fp.Algorithm, tmp_path: Path) -> None:
    alone = told(run(algorithm, engine=Sequential(1)))
    two = on(2, tmp_path / "2", lambda: run(algorithm))
    assert same(two, alone, 1e-5)
    assert on(3, tmp_path / "3", lambda: run(algorithm, out=tmp_path / "run")) == two  # the same bits
    assert without_seconds(records.read(tmp_path / "run" / "records.jsonl")) == [
        fp.Round.from_json(line) for line in two["history"]
    ]


def test_refused_uploads_and_empty_shares(tmp_path: Path) -> None:
    """Client 2 has nine examples, and its payloads are torn: it is refused once a round, with its reason."""
    algorithm = replace(fp.fedavg(0.1), codec=Damaged(codecs.Dense()), weighting="examples")
    alone = told(run(algorithm, cohort=6, engine=Sequential(1)))
    refused = [c for line in alone["history"] for c in fp.Round.from_json(line).clients if c.status == "rejected"]
    assert refused and {c.index for c in refused} == {23}
    assert same(on(2, tmp_path / "2", lambda: run(algorithm, cohort=6)), alone, 1e-5)
    for cohort in (1, 2):  # of three ranks, at least one has no client
        alone = told(run(cohort=cohort, engine=Sequential(1)))
        assert same(on(3, tmp_path / f"few-{cohort}", lambda cohort=cohort: run(cohort=cohort)), alone, 1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS[-2:], ids=lambda a: a.name)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_with_another_number_of_ranks(
    algorithm: fp.Algorithm, before: int, after: int, tmp_path: Path
) -> None:
    def part(count: int, rounds: int) -> dict[str, Any]:
        def go() -> fp.Result:
            return run(algorithm, rounds=rounds, out=tmp_path / "run", resume=rounds == ROUNDS)

        return told(go()) if count == 1 else on(count, tmp_path / f"{count}-{rounds}", go)

    part(before, 2)
    assert same(part(after, ROUNDS), told(run(algorithm, engine=Sequential(1))), 1e-5)


@dataclass(frozen=True)
class Stopping(Counting):
    """Counting, which may stop when every client is in its fourth round."""

    stops: bool = field(default=True, repr=False)

    def e_step(self, objective: Any, prior: Any, eta: Any, client: Any, state: Any, rng: Any) -> Any:
        if self.stops and state is not None and state["rounds"] == 3:
            raise ArithmeticError("four is enough")
        return super().e_step(objective, prior, eta, client, state, rng)


def test_states_of_rounds_that_are_run_again_are_forgotten(tmp_path: Path) -> None:
    """The last checkpoint is that of round 2, and round 4 fails: round 3 is run again with the states of round 2."""

    def go(stops: bool, **fields: Any) -> fp.Result:
        algorithm = fp.Algorithm(priors.Gaussian(), Stopping(inference.Point(0.1), stops), name="counting")
        return run(algorithm, cohort=6, availability=Availability(), **fields)

    saved = {"out": tmp_path / "run", "checkpoint_every": 2}
    said = rank_calls.call(2, tmp_path / "first", lambda rank: told(go(True, **saved)))
    assert {answer["error"] for answer in said if answer is not None} <= {"ArithmeticError", RankError.__name__}
    assert [r.number for r in records.read(tmp_path / "run" / "records.jsonl")] == [1, 2, 3]
    resumed = on(2, tmp_path / "second", lambda: go(False, resume=True, **saved))
    assert same(resumed, told(go(False, engine=Sequential(1))), 1e-5)


def test_ranks_keep_the_precision_of_the_model(tmp_path: Path) -> None:
    clients = [replace(c, train=fp.Examples(c.train.x.double(), c.train.y)) for c in APART]
    given = {"model": fp.models.mlp(4, (6,), 3).double(), "clients": clients, "test": None, "rounds": 2}
    two = on(2, tmp_path, lambda: run(**given))
    assert same(two, told(run(engine=Sequential(1), **given)), 1e-13)


@dataclass(frozen=True)
class Fatal:
    """Point, until client 33 is in its second round, where `what` happens to the process."""

    point: inference.Point
    what: str = field(default="", repr=False)

    def start(self, prior: Any, eta: Any) -> Any:
        return self.point.start(prior, eta)

    def e_step(self, objective: Any, prior: Any, eta: Any, client: Any, state: Any, rng: Any) -> Any:
        if client.index == 33 and state is not None and self.what:
            if self.what == "raise":
                raise ArithmeticError("seven is odd")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.what])
        q, _ = self.point.e_step(objective, prior, eta, client, None, rng)
        return q, {"seen": torch.ones(1)}


def fatal_run(what: str, folder: Path | None, **fields: Any) -> fp.Result:
    algorithm = fp.Algorithm(priors.Gaussian(), Fatal(inference.Point(0.1), what), name="fatal")
    return run(algorithm, out=folder, cohort=6, availability=Availability(), **fields)


def fatal(what: str, folder: Path, timeout_seconds: float = 60.0) -> tuple[int, list[dict[str, Any] | None]]:
    """The rank on which it happened, and what the ranks say."""
    ranks = rank_calls.start(
        2, folder, lambda rank: told(fatal_run(what, folder / "run", engine=TorchRun(timeout_seconds)))
    )
    if what == "stop":
        stopped = wait_for_stop(ranks)
        ranks[1 - stopped].join(30)
        os.kill(ranks[stopped].pid or 0, signal.SIGKILL)
    said = rank_calls.answers(ranks, folder, seconds=30)
    where = [r for r, answer in enumerate(said) if answer is None or answer.get("error") == "ArithmeticError"]
    assert len(where) == 1, said
    return where[0], said


def wait_for_stop(ranks: list[Any]) -> int:
    while True:
        states = [Path(f"/proc/{rank.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for rank in ranks]
        if "T" in states:
            return states.index("T")
        assert any(rank.is_alive() for rank in ranks)
        time.sleep(0.02)


def test_an_exception_ends_all_ranks(tmp_path: Path) -> None:
    rank, said = fatal("raise", tmp_path)
    own, other = said[rank], said[1 - rank]
    assert own is not None and "in round 2, client 'client-3' (index 33)" in own["notes"][0]
    assert other is not None and other["error"] == RankError.__name__
    assert f"rank {rank} failed: ArithmeticError: seven is odd; in round 2, client 'client-3'" in other["text"]
    assert "in e_step" in other["cause"]


@pytest.mark.parametrize(("what", "timeout_seconds", "after"), [("kill", 60.0, 1), ("kill", 60.0, 3), ("stop", 3.0, 1)])
def test_a_dead_rank_ends_all_and_the_run_goes_on(
    what: str, timeout_seconds: float, after: int, tmp_path: Path
) -> None:
    rank, said = fatal(what, tmp_path, timeout_seconds)
    other = said[1 - rank]
    assert other is not None and other["error"] == RankError.__name__
    assert other["text"].startswith(f"rank {rank} of 2 died, or did not answer")
    assert [r.number for r in records.read(tmp_path / "run" / "records.jsonl")] == [1]

    def go_on() -> fp.Result:
        return fatal_run("", tmp_path / "run", resume=True)

    resumed = told(go_on()) if after == 1 else on(after, tmp_path / "after", go_on)
    assert same(resumed, told(fatal_run("", None, engine=Sequential(1))), 1e-5)


def test_ranks_that_differ_are_refused(tmp_path: Path) -> None:
    for key, values in {"seed": (0, 1), "cohort": (3, 4), "rounds": (2, 3), "test": (TEST, None)}.items():
        given = rank_calls.call(2, tmp_path / key, lambda r, k=key, v=values: told(run(**{k: v[r]}, out=tmp_path / k)))
        assert given[0] is not None and given[0]["error"] == "ValueError"
        assert f"{key} is" in given[0]["text"] and "on rank 1" in given[0]["text"]
        assert given[1] is not None and given[1]["error"] == RankError.__name__
        assert not list((tmp_path / key).glob("*.jsonl"))
