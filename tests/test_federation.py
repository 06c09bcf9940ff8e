"""A federation gives the bits of the simulation, whatever comes from its nodes. The grid is in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedprior as fp
from cases import equal, without_seconds
from fedprior import checkpoint, records, report, tree
from fedprior.store import DiskStore

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from fedprior.federation import GridEngine, NodeError, Roster, Settings, client_app, serve
from grid import CLIENTS, MODEL, NODES, ROUNDS, LocalGrid, federated, own, simulated

ALGORITHMS = [
    fp.fedavg(0.1),
    replace(fp.fedavg(0.1, value_type="int8"), name="fedavg-int8"),
    fp.fedadam(0.1),
    fp.topk(0.1, 0.2),
    fp.feddropout(0.1),
    fp.fedsparse(0.1, density=0.3),
    replace(fp.fedsparse(0.1, lambda_0=0.3, gate_lr=0.4), name="fedsparse-gated"),
    fp.fedsparsemixture(0.1, density=0.5),
    fp.pfedvem(0.1),
    fp.fedpop(0.1, epochs=3, burn_in=1),
    fp.fedper(0.1),
    replace(fp.topk(0.1, 0.2), prior=fp.fedper(0.1).prior, name="fedper-topk"),
]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)


@algorithms
def test_the_model_the_bytes_and_the_records_are_those_of_the_simulation(
    algorithm: fp.Algorithm, tmp_path: Path
) -> None:
    got, want = federated(algorithm, tmp_path), simulated(algorithm)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert without_seconds(got.history) == without_seconds(want.history)
    assert got.bytes_up > 0 and got.bytes_down > 0


def test_the_folder_is_that_of_a_run(tmp_path: Path) -> None:
    result = federated(ALGORITHMS[0], tmp_path)
    out = tmp_path / "out"
    saved = checkpoint.read(out)
    assert saved is not None and saved.number == ROUNDS and equal(saved.eta, tree.flatten(result.eta))
    assert records.read(out / "records.jsonl") == result.history
    assert report.write(out).stat().st_size > 1000


@pytest.mark.parametrize("algorithm", [ALGORITHMS[0], ALGORITHMS[3], *ALGORITHMS[-2:]], ids=lambda a: a.name)
@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "crashed"])
def test_a_resumed_federation_has_the_bits_of_one_that_was_never_stopped(
    algorithm: fp.Algorithm, crash: bool, tmp_path: Path
) -> None:
    """After a crash the last round has a record and states on the nodes, and no checkpoint: it is run again."""
    federated(algorithm, tmp_path, rounds=2)
    if crash:
        kept = {path: path.read_bytes() for path in (tmp_path / "out").glob("checkpoint*")}
        federated(algorithm, tmp_path, rounds=3, resume=True)
        for path in (tmp_path / "out").glob("checkpoint*"):
            path.unlink()
        for path, data in kept.items():
            path.write_bytes(data)
    got, want = federated(algorithm, tmp_path, resume=True), simulated(algorithm)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert without_seconds(got.history) == without_seconds(want.history)


def test_a_new_run_does_not_overwrite_one(tmp_path: Path) -> None:
    federated(ALGORITHMS[0], tmp_path)
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="resume=true"):
        federated(ALGORITHMS[0], tmp_path)
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_node_may_leave_and_another_take_its_place(nodes: int, tmp_path: Path) -> None:
    """Partition 1 has no node in round 2; in round 3 it has a new one, and the newcomer of partition 0 waits."""
    algorithm = ALGORITHMS[0]
    grid = LocalGrid(client_app(algorithm, own, MODEL), nodes)
    engine = GridEngine(grid, nodes, seconds=0.5)

    def after(record: fp.Round) -> None:
        if record.number == 1:
            del grid.contexts[101]
        if record.number == 2:
            grid.add(200, 1, nodes)
            grid.add(201, 0, nodes)

    roster = Roster(len(CLIENTS), CLIENTS[0].train)
    result = fp.run(algorithm, MODEL, roster, rounds=4, engine=engine, on_round=after)
    lost = [c for c in result.history[1].lost()]
    assert {c.index for c in lost} == set(range(1, len(CLIENTS), nodes))
    assert {(c.status, c.reason, c.bytes_down) for c in lost} == {("dropped", "there is no node of partition 1", 0)}
    assert not result.history[0].lost() and not result.history[2].lost() and not result.history[3].lost()
    assert engine._seats.places == {0: 100, 1: 200} | {p: 100 + p for p in range(2, nodes)}


def test_what_does_not_fit_is_refused_before_round_one(tmp_path: Path) -> None:
    algorithm = ALGORITHMS[0]
    roster = Roster(len(CLIENTS), CLIENTS[0].train)

    def refused(grid: LocalGrid, match: str, nodes: int = NODES, error: type[Exception] = NodeError, **fields) -> None:
        with pytest.raises(error, match=match):
            fp.run(algorithm, MODEL, roster, rounds=1, engine=GridEngine(grid, nodes, seconds=0.2), **fields)

    good = client_app(algorithm, own, MODEL)
    refused(LocalGrid(good, 2), r"partitions \[2\].*--partitions 3|of 2, not of 3: nodes=")
    twins = LocalGrid(good, NODES)
    twins.add(150, 1, NODES)
    refused(twins, "another node is partition 1")
    refused(LocalGrid(client_app(fp.fedavg(0.2), own, MODEL), NODES), "its algorithm is")
    refused(LocalGrid(client_app(algorithm, own, fp.models.mlp(4, (5,), 3)), NODES), "its parameters is")
    refused(LocalGrid(client_app(algorithm, lambda p, n: [], MODEL), NODES), "has no clients")
    size = len(CLIENTS)
    for data, found in {
        "fewer": (lambda p, n: own(p, n)[: 2 - (p == 2)], r"has the clients 2 \(1\), .*clients=7 asks for 2, 5 \(2\)"),
        "more": (
            lambda p, n: [*own(p, n), replace(CLIENTS[0], index=p + 9)],
            r"the clients 2, 5, 11 \(3\), .*asks for 2, 5 \(2\)",
        ),
        "another number": (
            fp.data.LazyPopulation(size + 1, lambda i: replace(CLIENTS[0], index=i)),
            "a federation of 8",
        ),
    }.values():
        refused(LocalGrid(client_app(algorithm, data, MODEL), NODES), found)
    refused(LocalGrid(good, NODES, lambda n, request, reply: None), r"no node of the partitions \[0, 1, 2\]")
    refused(LocalGrid(good, NODES), "leave out availability", error=ValueError, availability=fp.Availability(0.1))
    with pytest.raises(ValueError, match="partition-id=0 num-partitions=3"):
        bare = LocalGrid(good, NODES)
        bare.contexts[100].node_config.clear()
        fp.run(algorithm, MODEL, roster, rounds=1, engine=GridEngine(bare, NODES, seconds=0.2))
    with pytest.raises(ValueError, match="at least 1 client, got 0"):
        Roster(0, CLIENTS[0].train)
    with pytest.raises(ValueError, match="example="):
        serve(LocalGrid(good, NODES), algorithm, MODEL, Settings(out=str(tmp_path)), 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rounds": 0}, "at least 1"),
        ({"rounds": "3"}, "must be of type int"),
        ({"cohort": 9}, "between 0"),
        ({"cohort": -1}, "between 0"),
        ({"nodes": 4}, "4 nodes share 3 clients"),
        ({"seconds": 0}, "positive"),
    ],
)
def test_a_runs_configuration_is_checked(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings().changed(config)
    assert Settings().changed({"rounds": 2, "seconds": 5, "other": "x"}) == Settings(rounds=2, seconds=5.0)


def test_a_run_key_is_no_path(tmp_path: Path) -> None:
    algorithm = ALGORITHMS[0]
    engine = GridEngine(LocalGrid(client_app(algorithm, own, MODEL), NODES), NODES, run="../../etc", seconds=0.5)
    roster = Roster(len(CLIENTS), CLIENTS[0].train)
    result = fp.run(algorithm, MODEL, roster, rounds=1, engine=engine)
    assert {c.status for c in result.history[0].clients} == {"failed"}
    assert "a run's key has up to 64 letters" in result.history[0].clients[0].reason
    assert torch.equal(next(iter(result.params.values())), next(iter(MODEL.state_dict().values())))


def test_states_are_kept_by_run_and_client(tmp_path: Path) -> None:
    federated(ALGORITHMS[-1], tmp_path, cohort=0)
    key = json.loads((tmp_path / "out" / "federation.json").read_text())["run"]
    folders = {path.name for path in (tmp_path / "states" / key).iterdir()}
    assert folders == {f"client-{c.index}" for c in CLIENTS}
    want = simulated(ALGORITHMS[-1], cohort=None).store
    for client in CLIENTS:
        mine = DiskStore(tmp_path / "states" / key / f"client-{client.index}").load(client.index)
        theirs = want.load(client.index)
        assert mine is not None and theirs is not None and equal(mine, theirs)
        assert {name.split("/")[0] for name in mine} == {"kept", "residual"}
    federated(ALGORITHMS[0], tmp_path / "other")
    assert not (tmp_path / "other" / "states").exists()
