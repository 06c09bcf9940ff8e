"""SIGKILL at any moment: the resumed run has the bits of one that was never stopped, and counts nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kill_worker
from fedprior import checkpoint, records

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def worker(*arguments: str) -> dict:
    command = [sys.executable, kill_worker.__file__, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def read(folder: Path) -> dict:
    return json.loads((folder / "done.json").read_text())


def check(folder: Path, want: dict, rounds: int) -> None:
    """Equal eta and records; each round once; each client's own count is the number of its rounds."""
    assert read(folder) == want
    history = records.read(folder / "records.jsonl")
    assert [r.number for r in history] == list(range(1, rounds + 1))
    for index, count in enumerate(want["counts"]):
        assert count == sum(c.index == index for r in history for c in r.clients)
    saved = checkpoint.read(folder)
    assert saved is not None and saved.number == rounds


def test_killed_at_random_times(tmp_path: Path) -> None:
    kill_worker.run(tmp_path / "whole", kill_worker.ROUNDS)
    told = worker(str(tmp_path / "killed"), "random", "0")
    assert told["kills"] >= 3, "the run was too fast to be killed often: give it more epochs"
    assert len(told["reached"]) >= 2, "no kill came in the middle of the run"
    check(tmp_path / "killed", read(tmp_path / "whole"), kill_worker.ROUNDS)


def test_killed_at_every_file_operation(tmp_path: Path) -> None:
    kill_worker.run(tmp_path / "whole", kill_worker.POINT_ROUNDS)
    points = worker(str(tmp_path), "points")["points"]
    assert points > 20
    for point in range(1, points + 1):
        check(tmp_path / f"point-{point}", read(tmp_path / "whole"), kill_worker.POINT_ROUNDS)
