"""The loop: equal seeds give equal bits, stopped runs go on as if nothing had happened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedprior as fp
from cases import classification_clients, equal, pooled, without_seconds
from fedprior import Availability, records, tree
from fedprior.codecs import Sparse

CLIENTS = classification_clients((6, 5, 9, 4, 7))
MODEL = fp.models.mlp(4, (6,), 3)
TEST = pooled(classification_clients((30,), seed=0))


def scheduled(algorithm: fp.Algorithm) -> fp.Algorithm:
    """A schedule of its own: otherwise it is that of the number of rounds asked for, and a shorter run has another."""
    return replace(algorithm, prior=replace(algorithm.prior, start=0.8, steps=3, hold=1))  # type: ignore


ALGORITHMS = [
    fp.fedavg(0.1),
    fp.fedprox(0.1, 2.0),
    fp.fedavgm(0.1),
    fp.fedadagrad(0.1),
    fp.fedadam(0.1),
    fp.fedyogi(0.1),
    fp.grouplasso(0.1, strength=0.06),
    fp.feddropout(0.1),
    replace(fp.feddropout(0.1), codec=Sparse("int8", "zlib"), delta=True, name="feddropout-int8"),
    replace(fp.fedavg(0.1, value_type="int4", entropy="zlib"), name="fedavg-int4"),
    fp.topk(0.1, 0.2),
    replace(fp.topk(0.1, 0.2, value_type="int8", weighting="uniform"), name="topk-int8"),
    fp.fedsparse(0.1, lambda_0=0.3, gate_lr=0.4),
    scheduled(fp.fedsparse(0.1, density=0.3)),
    replace(scheduled(fp.fedsparse(0.1, density=0.3, value_type="int8")), name="fedsparse-int8"),
]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
FLEET = Availability(dropout=0.2)


def run(algorithm: fp.Algorithm = ALGORITHMS[0], rounds: int = 6, **fields) -> fp.Result:
    fields = {"cohort": 3, "test": TEST, "availability": FLEET, "clients": CLIENTS, "model": MODEL} | fields
    return fp.run(algorithm, rounds=rounds, **fields)


@algorithms
def test_equal_seeds_equal_results(algorithm: fp.Algorithm) -> None:
    a, b, other = run(algorithm), run(algorithm), run(algorithm, seed=1)
    assert equal(tree.flatten(a.eta), tree.flatten(b.eta))
    assert without_seconds(a.history) == without_seconds(b.history)
    assert not equal(tree.flatten(a.eta), tree.flatten(other.eta))
    assert [c.index for r in a.history for c in r.clients] != [c.index for r in other.history for c in r.clients]


class Stop(Exception):
    """Raised by on_round: the user's Ctrl-C."""


@algorithms
@pytest.mark.parametrize(("stop", "every"), [(1, 1), (4, 1), (4, 3)])
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(
    algorithm: fp.Algorithm, stop: int, every: int, tmp_path: Path
) -> None:
    def stop_after_one(record: fp.Round) -> None:
        if stop == 1 and record.number == 2:  # round 1 is on disk then; a schedule does not fit a run of one round
            raise Stop

    whole = run(algorithm)
    try:
        run(algorithm, rounds=max(stop, 4), out=tmp_path, checkpoint_every=every, on_round=stop_after_one)
    except Stop:
        assert stop == 1
    resumed = run(algorithm, out=tmp_path, resume=True, checkpoint_every=every)
    assert equal(tree.flatten(resumed.eta), tree.flatten(whole.eta))
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    written = records.read(tmp_path / "records.jsonl")
    assert written == resumed.history


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_run_stopped_between_checkpoints_repeats_the_rounds_since(every: int, tmp_path: Path) -> None:
    def stop(record: fp.Round) -> None:
        if record.number == 3:
            raise Stop

    with pytest.raises(Stop):
        run(ALGORITHMS[4], out=tmp_path, checkpoint_every=every, on_round=stop)
    again = []
    resumed = run(ALGORITHMS[4], out=tmp_path, resume=True, checkpoint_every=every, on_round=again.append)
    assert [r.number for r in again] == list(range(3 // every * every + 1, 7))
    whole = run(ALGORITHMS[4])
    assert equal(tree.flatten(resumed.eta), tree.flatten(whole.eta))
    assert without_seconds(records.read(tmp_path / "records.jsonl")) == without_seconds(whole.history)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = run(out=tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    again = run(out=tmp_path, resume=True)
    assert equal(again.params, first.params) and again.history == first.history
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == files


def test_resume_without_a_run_starts_one(tmp_path: Path) -> None:
    assert equal(run(out=tmp_path / "new", resume=True).params, run().params)


CHANGED = {
    "seed": {"seed": 1},
    "cohort": {"cohort": 2},
    "algorithm": {"algorithm": fp.fedavg(0.2)},
    "population": {"clients": CLIENTS[:4]},
    "availability": {"availability": Availability(dropout=0.3)},
    "parameters": {"model": fp.models.mlp(4, (7,), 3)},
}


@pytest.mark.parametrize("key", CHANGED)
def test_resuming_with_another_setting_is_refused_by_name(key: str, tmp_path: Path) -> None:
    run(rounds=2, out=tmp_path)
    before = (tmp_path / "records.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"its {key} was"):
        run(out=tmp_path, resume=True, **CHANGED[key])
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(rounds=1, out=tmp_path)
    with pytest.raises(FileExistsError, match="resume=True"):
        run(rounds=1, out=tmp_path)


def damage_tensors(folder: Path) -> None:
    path = next(folder.glob("checkpoint-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_index(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_bytes(path.read_bytes()[:-20])


def remove_tensors(folder: Path) -> None:
    next(folder.glob("checkpoint-*.safetensors")).unlink()


@pytest.mark.parametrize("damage", [damage_tensors, damage_index, remove_tensors], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_told(damage, tmp_path: Path) -> None:
    run(rounds=2, out=tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match="damaged"):
        run(out=tmp_path, resume=True)


def test_records(tmp_path: Path) -> None:
    """A torn last line is left out; a damaged line before it is an error with its number."""
    history = run(rounds=3, out=tmp_path).history
    path = tmp_path / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert [fp.Round.from_json(line) for line in lines] == history
    assert [list(json.loads(line)["metrics"]) for line in lines] == [["nats", "accuracy"]] * 3
    for cut in (1, len(lines[2]) // 2, len(lines[2]) - 1):
        path.write_text("".join(lines[:2]) + lines[2][:cut])
        kept = records.read(path)
        assert kept[:2] == history[:2] and kept[2:] in ([], history[2:])
    path.write_text(lines[0] + lines[1][:20] + "\n" + lines[2])
    with pytest.raises(ValueError, match="line 2"):
        records.read(path)


def test_seconds_are_counted_apart() -> None:
    """Training, the wire and evaluation; the first two are parts of a round's seconds, the third is none."""
    result = run(evaluate_every=2, rounds=3, test=TEST, engine=fp.engines.Sequential(1))
    for record in result.history:
        assert record.seconds_train == pytest.approx(sum(c.seconds for c in record.clients))
        assert record.seconds_wire >= sum(c.seconds_wire for c in record.clients) > 0
        assert record.seconds_train > 0 and record.seconds_train + record.seconds_wire < record.seconds
        assert (record.seconds_evaluate > 0) == bool(record.metrics)
    assert result.seconds == pytest.approx(sum(r.seconds + r.seconds_evaluate for r in result.history))


def test_totals_are_sums_over_clients() -> None:
    result = run(ALGORITHMS[-1])
    for record in result.history:
        assert record.bytes_up == sum(c.bytes_up for c in record.clients)
        assert record.bytes_down == sum(c.bytes_down for c in record.clients)
    assert result.bytes_up == sum(r.bytes_up for r in result.history)
    with torch.no_grad():
        logits = result.model()(TEST.x)
    nats = -logits.double().log_softmax(1)[range(len(TEST)), TEST.y].mean()
    assert result.nats == pytest.approx(float(nats), abs=1e-6)
    assert result.accuracy == pytest.approx(float((logits.argmax(1) == TEST.y).double().mean()))


def test_evaluate_every_and_on_round() -> None:
    seen: list[fp.Round] = []
    result = run(rounds=5, evaluate_every=2, on_round=seen.append)
    assert [bool(r.metrics) for r in result.history] == [False, True, False, True, True]
    assert seen == result.history
    plain = run(rounds=5)
    assert equal(plain.params, result.params)
    assert [replace(r, metrics={}) for r in without_seconds(plain.history)] == [
        replace(r, metrics={}) for r in without_seconds(result.history)
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": 0}, "at least 1"),
        ({"cohort": 0}, "cohort must be between 1 and the 5"),
        ({"cohort": 6}, "cohort must be between 1 and the 5"),
        ({"clients": []}, "no clients"),
        ({"checkpoint_every": 0}, "at least 1"),
        ({"loss": "classifcation"}, "unknown loss"),
        ({"loss": "regression"}, "do not fit"),
        ({"model": fp.models.softmax(5, 3)}, "do not fit"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_round_one(fields, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(out=tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()
