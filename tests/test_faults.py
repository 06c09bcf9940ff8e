"""Faults of the machine: a full disk, torn files, clocks that jump, and bytes that are not what was sent."""

from __future__ import annotations

import errno
import itertools
import json
import time
from pathlib import Path

import pytest
import torch

import fedprior as fp
from cases import classification_clients, equal, without_seconds
from draws import torn
from fedprior import checkpoint, records, tree
from fedprior.codecs.frame import HEADER_BYTES
from fedprior.rng import numpy_generator
from fedprior.store import DiskStore
from stateful import Counting
from test_wire_fuzz import valid_or_refused
from wire import CASES, Case, seal

CLIENTS = classification_clients((6, 5, 7))
MODEL = fp.models.mlp(4, (5,), 3)


def run(out: Path | None = None, rounds: int = 3, resume: bool = False) -> fp.Result:
    """Records, checkpoints and personal states."""
    algorithm = fp.Algorithm(fp.priors.Gaussian(0.1), Counting(fp.inference.Point(0.05, 1, 3)), fp.server.Adam(0.05))
    engine = fp.engines.Sequential(1)
    return fp.run(algorithm, MODEL, CLIENTS, rounds=rounds, cohort=2, engine=engine, out=out, resume=resume)


def same(got: fp.Result, want: fp.Result) -> None:
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert without_seconds(got.history) == without_seconds(want.history)


class Full:
    """A file on a disk that takes half of the n-th write of all files, and nothing after it."""

    writes, room = 0, 0

    def __init__(self, file) -> None:
        self.file = file

    def write(self, data) -> None:
        Full.writes += 1
        if Full.writes >= Full.room:
            self.file.write(data[: len(data) // 2 if Full.writes == Full.room else 0])
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def test_a_disk_that_fills_up_at_any_write_leaves_a_run_to_resume(tmp_path: Path, monkeypatch) -> None:
    """The error names the file, the checkpoint is the last whole one, and the resumed run has the same bits."""
    want, opened = run(), Path.open

    def limited(self: Path, mode: str = "r", *args, **fields):
        file = opened(self, mode, *args, **fields)
        return Full(file) if mode[0] in "wa" else file

    for room in itertools.count(1):
        out = tmp_path / str(room)
        Full.writes, Full.room = 0, room
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", limited)
            try:
                run(out)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC and str(out) in str(error.filename), room
        assert not list(out.rglob(".*.tmp"))
        whole = [r for r in records.read(out / "records.jsonl")] if (out / "records.jsonl").exists() else []
        saved = checkpoint.read(out)
        assert (saved.number if saved else 0) in (len(whole), len(whole) - 1)
        same(run(out, resume=True), want)
    assert room > 12  # three rounds write a record, two files of a checkpoint and two states each


def cuts(size: int) -> list[int]:
    """Every length of a small file; of a larger one the ends and every 37th."""
    return [n for n in range(size) if n < 200 or n > size - 50 or n % 37 == 0]


def test_a_checkpoint_torn_at_any_length_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    for path in tmp_path.glob("checkpoint*"):
        data = path.read_bytes()
        for size in cuts(len(data)):
            path.write_bytes(data[:size])
            with pytest.raises(ValueError, match="is damaged"):
                checkpoint.read(tmp_path)
        path.write_bytes(data)
    assert checkpoint.read(tmp_path) is not None


EDITS: list[dict] = [{"number": n} for n in (1, 4, -3, 3.0, "3", None)]
EDITS += [
    {"tensors": "../checkpoint-000003.safetensors"},
    {"tensors": None},
    {"sha256": "0"},
    {"setting": None},
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_an_edited_checkpoint_is_refused_with_what_to_do(edit: dict, tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / checkpoint.INDEX
    index = json.loads(path.read_text())
    lacking = {k: v for k, v in index.items() if k not in edit}
    for changed in (index | edit, lacking, list(index)):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"is damaged: .*; put the file back, or start again in another folder"):
            checkpoint.read(tmp_path)
    path.write_text(json.dumps(index))
    assert checkpoint.read(tmp_path) is not None


def test_records_torn_at_any_length_give_the_whole_lines_or_a_clear_error(tmp_path: Path) -> None:
    """Rounds before the checkpoint must be there; a torn line after it is the crash's, and is cut off."""
    history, path = run(tmp_path).history, tmp_path / "records.jsonl"
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in cuts(len(data)):
        path.write_bytes(data[:size])
        whole = sum(end - 1 <= size for end in ends)  # the last line is whole without its line feed
        assert records.read(path) == history[:whole]
        if whole == 2:
            file = records.RecordFile(path, 2)
            file.close()
            assert path.read_bytes() == data[: ends[1]]
        if whole < 2:
            with pytest.raises(ValueError, match="one record for each of the 2 rounds"):
                records.RecordFile(path, 2)


def test_a_state_torn_at_any_length_is_refused(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.save(4, 1, {"scale": torch.ones(3), "count": torch.tensor(2)})
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"state of client 4 .* is torn"):
            DiskStore(tmp_path).load(4)


def test_clocks_that_jump_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durations are of a monotonic clock: the wall clock goes back an hour or a day forward at every look."""
    want, jumps, began = run(), itertools.cycle([-3600.0, 86400.0]), time.perf_counter()
    now = [time.time()]

    def jumping() -> float:
        now[0] += next(jumps)
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    got = run()
    same(got, want)
    took = time.perf_counter() - began
    for record in got.history:
        assert 0 <= record.seconds <= took and 0 <= record.seconds_train <= took and 0 <= record.seconds_wire <= took


@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_payloads_are_messages_or_refused(count: int) -> None:
    """Each differs in one to three bytes or in length; every other one has a checksum that fits."""
    for number, case in enumerate(CASES):
        message = case.message()
        original = case.codec.encode(message, 1)
        seen = [mutated(case, message, original, number, k) for k in range(count // len(CASES) + 1)]
        assert not all(seen)


def mutated(case: Case, message, original: bytes, number: int, k: int) -> bool:
    rng = numpy_generator(0, "mutated", number, k)
    payload = torn(original, rng, k % 5 == 0)
    sealed = k % 2 and len(payload) >= HEADER_BYTES
    got = valid_or_refused(case, seal(payload) if sealed else payload, message)
    assert sealed or not got or payload == original
    return got
