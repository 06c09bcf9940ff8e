"""What `fedprior federate` says where Flower refuses: one line, all keys tried. A stub stands for flwr."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedprior import federate
from fedprior.cli import app


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that notes its arguments in `calls`, refuses node-0, and does not know any run."""
    program = tmp_path / "flwr"
    answer = r'{"success": false, "error-message": "Using SuperLink\n\n[code: 16] Run ID not found."}'
    program.write_text(
        f"#!/bin/sh\necho \"$3\" >> {tmp_path}/calls\nprintf '%s' '{answer}'\n"
        'case "$3" in *node-0.pub) exit 1;; esac\n'
    )
    program.chmod(0o700)
    monkeypatch.setattr(federate, "_program", lambda name: str(program))
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "ca.crt").touch()
    return tmp_path


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["federate", *arguments])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output
    return done.stderr


def test_register_tries_every_key(flwr: Path) -> None:
    """A key of an earlier time, which Flower refuses, does not keep a new one out."""
    for node in range(3):
        (flwr / "keys" / f"node-{node}.pub").touch()
    said = refused("register", "a:1", "--keys", str(flwr / "keys"))
    assert "1 of 3 keys" in said and "(node-0.pub)" in said
    assert [Path(line).name for line in (flwr / "calls").read_text().split()] == [f"node-{n}.pub" for n in range(3)]


def test_register_without_public_keys(flwr: Path) -> None:
    assert "has no node-*.pub" in refused("register", "a:1", "--keys", str(flwr / "keys"))


def test_a_node_is_not_told_to_make_a_ca_of_its_own(flwr: Path) -> None:
    place = ("--partition", "1", "--partitions", "3", "--keys", str(flwr / "keys"))
    said = refused("supernode", "a:1", *place)
    assert "node-1" in said and "copy it from there" in said


def test_traffic_of_a_run_that_the_superlink_forgot(flwr: Path) -> None:
    (flwr / "federation.json").write_text('{"run": "a", "flower": [7]}')
    (flwr / "records.jsonl").touch()
    said = refused("traffic", str(flwr), "a:1", "--keys", str(flwr / "keys"))
    assert "run 7" in said and "[code: 16] Run ID not found." in said and "--database" in said
