"""Deployed federations whose processes are killed: nothing counts twice, and what is lost is recorded as that."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fedprior as fp
from cases import equal, hidden, without_seconds
from fedprior import checkpoint, records, tree
from fedprior.rng import numpy_generator

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from deployment import CLIENTS, NODES, Deployment, after_round, begin_run, programs, project, simulated, start_run

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A federation for several runs."""
    with Deployment(tmp_path_factory.mktemp("nodes")) as d:
        for partition in range(NODES):
            d.node(partition, NODES)
        yield d


def counted_once(folder: Path, want: fp.Result, shown: Callable[[list[fp.Round]], Any], told: str) -> None:
    """Bits, records as far as they are `shown`, and one state a client: those of the simulation."""
    history, saved = records.read(folder / "out" / "records.jsonl"), checkpoint.read(folder / "out")
    assert saved is not None and equal(saved.eta, tree.flatten(want.eta)), told
    assert without_seconds(history) == shown(want.history), told
    states = list((folder / "job").glob("*/client-*"))
    assert len(states) == len({c.index for r in want.history for c in r.clients})


@slow
def test_a_server_that_is_killed_resumes_and_counts_nothing_twice(nodes: Deployment, tmp_path: Path) -> None:
    """At a random moment of round two, in any exchange of a secure sum, with heads that stay on the nodes.

    Bits and bytes are those of the simulation, which a state or an upload too many would change.
    """
    task = project(tmp_path / "job", "replace(fp.fedper(lr=0.1), weighting='uniform', secure=SecureSum())")
    moment = float(numpy_generator(int.from_bytes(os.urandom(4), "big"), "moment").uniform(0, 14))
    begin_run(nodes, tmp_path, rounds=2)
    after_round(nodes, tmp_path, 1)
    time.sleep(moment)
    servers = programs(nodes, "flwr-serverapp")
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    before = records.read(tmp_path / "out" / "records.jsonl")
    nodes.stop("run")
    printed = start_run(nodes, tmp_path, rounds=2, resume=True)
    told = f"killed {moment:.2f} s after round 1\n{printed}"
    assert servers and len(before) == 1, told
    counted_once(tmp_path, simulated(task, rounds=2), hidden, told)


@slow
def test_a_superlink_that_is_killed_and_everything_started_anew_has_the_bits_of_a_run_that_was_never_stopped(
    tmp_path: Path,
) -> None:
    """At a random moment of round two, which takes 6 s; the nodes, where the heads are, are killed too: a power cut."""
    task = project(tmp_path / "job", "fp.fedper(lr=0.1)")
    moment = float(numpy_generator(int.from_bytes(os.urandom(4), "big"), "moment").uniform(0, 4))
    with Deployment(tmp_path) as d:
        for partition in range(NODES):
            d.node(partition, NODES)
        begin_run(d, tmp_path, rounds=2)
        after_round(d, tmp_path, 1)
        time.sleep(moment)
        killed = programs(d, "flower-superlink")
        for pid in [*killed, *programs(d, "flwr"), *programs(d, "flower"), *programs(d, "fedprior")]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        d.stop(*list(d.processes))
        before = records.read(tmp_path / "out" / "records.jsonl")
        d.__enter__()
        for partition in range(NODES):
            d.node(partition, NODES)
        printed = start_run(d, tmp_path, rounds=2, resume=True)
    told = f"killed {moment:.2f} s after round 1\n{printed}"
    assert killed and len(before) == 1, told
    counted_once(tmp_path, simulated(task, rounds=2), without_seconds, told)


@slow
def test_a_node_that_is_killed_and_one_that_straggles_are_recorded_and_the_run_goes_on(
    nodes: Deployment, tmp_path: Path
) -> None:
    """In round 2 the node of partition 1 pauses for longer than the deadline; then that of partition 2 is killed."""
    task = project(tmp_path / "job", "fp.fedavg(lr=0.1)")
    begin_run(nodes, tmp_path, rounds=3, cohort=CLIENTS, seconds=25)
    after_round(nodes, tmp_path, 1)
    os.killpg(nodes.processes["node-1"].pid, signal.SIGSTOP)
    after_round(nodes, tmp_path, 2)
    os.killpg(nodes.processes["node-1"].pid, signal.SIGCONT)
    os.killpg(nodes.processes["node-2"].pid, signal.SIGKILL)
    after_round(nodes, tmp_path, 3)
    nodes.processes["run"].wait(60)
    printed = nodes.log("run")
    history = records.read(tmp_path / "out" / "records.jsonl")
    lost = {(r.number, c.index) for r in history for c in r.lost()}
    late = {(r.number, c.index) for r in history for c in r.clients if c.status == "late"}
    assert lost == late == {(n, i) for n, p in ((2, 1), (3, 2)) for i in range(p, CLIENTS, NODES)}, printed
    assert "no answer within 25 s" in history[1].lost()[0].reason
    want, saved = simulated(task, lost, rounds=3, cohort=CLIENTS), checkpoint.read(tmp_path / "out")
    assert saved is not None and equal(saved.eta, tree.flatten(want.eta)), printed
