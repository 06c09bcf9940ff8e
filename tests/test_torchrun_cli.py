"""Ranks from the command line: below torchrun, and engines by name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import rank_calls
from cases import close, without_seconds
from cli_calls import TINY, call, refused
from fedprior import personalised, records
from fedprior.engines import named

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def test_the_command_line_below_torchrun(tmp_path: Path) -> None:
    """Two ranks as torchrun starts them: one output, one folder, the results of one process, which goes on there."""
    toml, folder = tmp_path / "my.toml", tmp_path / "out"
    toml.write_text(TINY)
    ranks = rank_calls.torchrun(2, toml, "--out", folder)
    out, err = rank_calls.finished(ranks, 100)
    assert ranks.returncode == 0, err
    assert out.count("┃ accuracy ┃") == out.count(personalised.TITLE) == 1 and out.count(str(folder)) == 2, out
    call("run", toml, "--out", tmp_path / "alone", "--engine", "sequential", "--quiet")
    alone, together = (records.read(place / "records.jsonl") for place in (tmp_path / "alone", folder))
    assert [replace(r, metrics={}) for r in without_seconds(together)] == [
        replace(r, metrics={}) for r in without_seconds(alone)
    ]
    assert close(load_file(folder / "model.safetensors"), load_file(tmp_path / "alone" / "model.safetensors"), 1e-5)
    rows, own = (personalised.read(place) for place in (folder, tmp_path / "alone"))
    assert [row["client"] for row in rows] == [row["client"] for row in own]
    for a, b in zip(rows, own, strict=True):
        assert a["after_nats"] == pytest.approx(b["after_nats"], abs=1e-4)
    toml.write_text(TINY.replace("rounds = 3", "rounds = 4"))
    call("run", toml, "--resume", folder, "--quiet")
    assert len(records.read(folder / "records.jsonl")) == 4


@pytest.mark.parametrize(("name", "message"), [("torchrun", "torchrun --nproc-per-node"), ("turbo", "unknown engine")])
def test_engines_by_name(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(TINY)
    assert message in refused("run", tmp_path / "my.toml", "--engine", name, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="more than once"), pytest.MonkeyPatch.context() as patch:
        for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
            patch.setenv(key, value)
        named("workers", 1, 60.0)
