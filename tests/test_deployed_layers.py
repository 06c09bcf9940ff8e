"""Deployed federations with privacy and with a robust rule: the simulation's bits, where noise is known afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fedprior as fp
from cases import equal, hidden, without_seconds
from fedprior import checkpoint, records, tree
from fedprior.core import Params
from fedprior.privacy import Privacy, central
from fedprior.privacy.accountant import ORDERS
from fedprior.rng import noise_generator

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from deployment import CLIENTS, COHORT, NODES, Deployment, begin_run, project, simulated
from spending import spent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # three runs at once, on whatever else the machine does
KNOWN = Privacy(noise_multiplier=1.0, delta=0.01)
CLIPPED = "delta=0.01, clip=0.5"
WISHES = {
    "robust": "robust=CentredClip()",
    "central": f"privacy=Privacy(noise_multiplier=0.5, quantile=0.5, {CLIPPED})",
    "distributed": f"secure=SecureSum(), privacy=Privacy(target_epsilon=20.0, {CLIPPED})",
    "without noise": f"secure=SecureSum(), privacy=Privacy(noise_multiplier=0.0, {CLIPPED})",
}
ROUNDS = {"robust": 1, "central": 2, "distributed": 1}


class Ran(NamedTuple):
    """A run that was deployed, and the task that it shares with a simulation."""

    folder: Path
    task: Any
    printed: str

    @property
    def eta(self) -> Params:
        saved = checkpoint.read(self.folder / "out")
        assert saved is not None, self.printed
        return saved.eta

    @property
    def history(self) -> list[fp.Round]:
        return without_seconds(records.read(self.folder / "out" / "records.jsonl"))


def task_of(folder: Path, name: str) -> Any:
    return project(folder / "job", f"replace(fp.fedavg(lr=0.1, weighting='uniform'), {WISHES[name]})")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """All runs at once on the same nodes, as most of a round is waiting."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ROUNDS}
    tasks = {name: task_of(folders[name], name) for name in ROUNDS}
    with Deployment(tmp_path_factory.mktemp("nodes")) as d:
        for partition in range(NODES):
            d.node(partition, NODES)
        for name, rounds in ROUNDS.items():
            begin_run(d, folders[name], name, rounds=rounds)
        for name in ROUNDS:
            d.processes[name].wait(240)
        return {name: Ran(folders[name], tasks[name], d.log(name)) for name in ROUNDS}


def test_a_robust_rule_has_the_bits_of_the_simulation(ran: dict[str, Ran]) -> None:
    got = ran["robust"]
    want = simulated(got.task, rounds=ROUNDS["robust"])
    assert equal(got.eta, tree.flatten(want.eta)), got.printed
    assert got.history == without_seconds(want.history)


def test_the_servers_noise_is_all_that_it_adds_to_the_simulation(
    ran: dict[str, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is in noise.key a simulation has its bits, a clip that adapts and what is spent."""
    got, rounds = ran["central"], ROUNDS["central"]
    secret = int((got.folder / "out" / "noise.key").read_text(), 16)
    other = simulated(got.task, rounds=rounds)
    monkeypatch.setattr(central, "noise_generator", lambda seed, *names: noise_generator(secret, *names))
    want = simulated(got.task, rounds=rounds)
    assert equal(got.eta, tree.flatten(want.eta)) and not equal(got.eta, tree.flatten(other.eta)), got.printed
    assert got.history == without_seconds(want.history)
    known = [spent(KNOWN, 0.5, n, COHORT, CLIENTS, ORDERS) for n in range(1, rounds + 1)]
    assert [r.layer["epsilon"] for r in got.history] == pytest.approx(known)


def test_the_nodes_noise_is_as_large_as_their_target_asks(ran: dict[str, Ran], tmp_path: Path) -> None:
    """Each of those that must stay, 6 of 8, adds a sixth of the variance (z C)^2; here all stay."""
    got = ran["distributed"]
    want, quiet = (simulated(task, rounds=1) for task in (got.task, task_of(tmp_path, "without noise")))
    (record,), told = got.history, hidden(want.history)[0]
    assert record.clients == told.clients and record.layer == told.layer, got.printed
    z = want.algorithm.privacy.noise_multiplier  # type: ignore
    known = spent(KNOWN, z, 1, COHORT, CLIENTS, ORDERS)
    assert known <= 20.0 and record.layer["epsilon"] == pytest.approx(known)
    noise = torch.cat([(v - tree.flatten(quiet.eta)[k]).flatten() for k, v in got.eta.items()]).double()
    assert float(noise.std()) == pytest.approx(z * 0.5 * (COHORT / 6) ** 0.5 / COHORT, rel=4 / (2 * len(noise)) ** 0.5)
