"""torchrun itself, with a rank killed at some moment: a clear end, and the run goes on with other numbers of ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import rank_calls
from cli_calls import TINY, call
from fedprior import records
from fedprior.rng import numpy_generator
from laws import close

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks in /proc")
ROUNDS = 400
TOML = TINY.replace("rounds = 3", f"rounds = {ROUNDS}").replace('"fedprox"\nprecision = 2', '"scaffold"')


def rank_process(torchrun: int, rank: int) -> int:
    """The process that torchrun has started as `rank`."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    variables = {int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children}
    return next(child for child, own in variables.items() if f"RANK={rank}".encode() in own)


def rounds_of(folder: Path) -> int:
    return len(records.read(folder / "records.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_torchrun_and_the_run_goes_on(killed: int, tmp_path: Path) -> None:
    """Control variates are states of the clients: a round that is counted twice, or lost, would show in the model."""
    toml, folder, rng = tmp_path / "my.toml", tmp_path / "out", numpy_generator(killed, "moment")
    toml.write_text(TOML)
    ranks = rank_calls.torchrun(2, toml, "--out", folder)
    try:
        while rounds_of(folder) < 5:
            assert ranks.poll() is None, rank_calls.finished(ranks)
            time.sleep(0.02)
        time.sleep(float(rng.uniform(0, 0.5)))
        os.kill(rank_process(ranks.pid, killed), signal.SIGKILL)
        out = "".join(rank_calls.finished(ranks))
    finally:
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
    assert ranks.returncode != 0 and "Signal 9 (SIGKILL)" in out, out
    done = rounds_of(folder)
    assert 5 <= done < ROUNDS
    for count, rounds in ((3, done + 8), (1, done + 10)):
        toml.write_text(TOML.replace(f"rounds = {ROUNDS}", f"rounds = {rounds}"))
        ranks = rank_calls.torchrun(count, toml, "--resume", folder)
        told = rank_calls.finished(ranks)
        assert ranks.returncode == 0, told
        assert [r.number for r in records.read(folder / "records.jsonl")] == list(range(1, rounds + 1))
    call("run", toml, "--out", tmp_path / "alone", "--engine", "sequential", "--quiet")
    assert close(load_file(folder / "model.safetensors"), load_file(tmp_path / "alone" / "model.safetensors"), 1e-4)
