"""E-steps around Point: one whose clients count their own rounds and let it show, and one that is watched.

And what must be on the disks of a federation's nodes after a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fedprior as fp
from cases import equal
from fedprior import Client, Params, inference, posteriors
from fedprior.core import Eta, Prior
from fedprior.objective import Objective
from fedprior.store import ClientStore, DiskStore


@dataclass(frozen=True)
class Counting:
    """Point, plus 0.001 x (rounds that the client took part in) on every parameter."""

    point: inference.Point

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        return self.point.start(prior, eta)

    def e_step(
        self, objective: Objective, prior: Prior, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[Any, Params | None]:
        q, _ = self.point.e_step(objective, prior, eta, client, None, rng)
        rounds = torch.ones(1, device=client.train.x.device) if state is None else state["rounds"] + 1
        return posteriors.Point({k: v + 0.001 * rounds for k, v in q.phi.items()}), {"rounds": rounds}


@dataclass(frozen=True)
class Watched:
    """Point, and a list of (client's index, the eta that it received)."""

    point: inference.Point
    seen: list[tuple[int, Eta]] = field(default_factory=list, repr=False)

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        return self.point.start(prior, eta)

    def e_step(
        self, objective: Objective, prior: Prior, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[Any, Params | None]:
        self.seen.append((client.index, eta))
        return self.point.e_step(objective, prior, eta, client, state, rng)


def states_of_the_last_accepted(folder: Path, history: Sequence[fp.Round], want: ClientStore) -> None:
    """On the nodes' disks, `folder`/client-I holds what client I had after its last upload that counted.

    Beside it there is at most one other state: an older one, or that of a round whose upload did not arrive.
    """
    last: dict[int, int] = {}
    for record in history:
        last |= {client.index: record.number for client in record.clients if client.status == "ok"}
    for index, number in last.items():
        files = sorted(path.name for path in (folder / f"client-{index}").glob("*.safetensors"))
        assert f"client-{index}.round-{number}.safetensors" in files and len(files) <= 2, (index, number, files)
        store, theirs = DiskStore(folder / f"client-{index}"), want.load(index)
        store.rollback(number)
        mine = store.load(index)
        assert mine is not None and theirs is not None and equal(mine, theirs), (index, number)
