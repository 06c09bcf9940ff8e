"""Several processes, on one machine or many, started by torchrun: each does a share of every cohort.

    a round   rank 0   hands out the personal states of each rank's clients
              each     does its clients one after the other and adds up their statistics
              rank 0   collects records and new states, and tells the records, in the order of the cohort, to all
              all      add the ranks' sums (all-reduce), and take the same M-step

Sums are kept in float64 and rounded once, at the end (total.py): of float32 statistics the bits depend neither on how
many ranks there are nor on who did which client. The sequential engine rounds after every client, and differs by that.

Shares are dealt by what clients cost when they were last seen, the dearest first. Every rank knows the costs, from the
records, and deals alike. States stay in the store of rank 0, which alone reads and writes the run's folder: the folder
need not be shared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fedprior.checkpoint import Checkpoint
from fedprior.core import Examples, Params, Stats
from fedprior.engines.costs import Costs
from fedprior.engines.ranks import Ranks, launched, leads
from fedprior.engines.sequential import Sequential
from fedprior.engines.states import new_states, states, unpacked
from fedprior.engines.total import Total, check_same, rounded, zeros
from fedprior.metrics import Sums, evaluate
from fedprior.objective import Objective
from fedprior.posteriors import Predictive
from fedprior.records import ClientRecord, Round
from fedprior.store import MemoryStore


@dataclass
class TorchRun:
    """This process as one of torchrun's.

    Attributes:
        timeout_seconds: how long ranks wait for each other: more than the longest share of a round takes.
    """

    timeout_seconds: float = 1800.0
    costs: Costs = field(default_factory=Costs, repr=False)
    _joined: Ranks | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not launched():
            raise ValueError(
                "there is no other process here: start the run with torchrun --nproc-per-node=N, N at least 2, "
                'or take the engine "auto"'
            )
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {self.timeout_seconds}")

    @property
    def leads(self) -> bool:
        """Does this rank print and write?"""
        return leads()

    def place(self, device: str) -> str:
        """The device of this rank: "cuda" is a GPU of its own."""
        if device != "cuda":
            return device
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return f"cuda:{os.environ['LOCAL_RANK']}"

    def begin(
        self, setting: Mapping[str, Any], start: Callable[[], tuple[Checkpoint, list[Round]]]
    ) -> tuple[Checkpoint, list[Round]]:
        """Where the run begins: `start()` on rank 0, and the same on the others, which do not read the folder.

        Raises:
            ValueError: on rank 0, if another rank has another setting.
        """

        def merge(settings: Sequence[bytes]) -> bytes:
            for rank, other in enumerate(map(json.loads, settings)):
                for key, value in setting.items():
                    if other[key] != value:
                        raise ValueError(
                            f"the ranks differ: {key} is {value!r} on rank 0, {other[key]!r} on rank {rank}"
                        )
            saved, history = start()
            head = {"number": saved.number, "history": [record.to_json() for record in history]}
            return json.dumps(head).encode() + b"\n" + saved.tensors()

        head, tensors = self._ranks().together(json.dumps(setting).encode, merge).split(b"\n", 1)
        told = json.loads(head)
        return Checkpoint.of(told["number"], tensors, setting), [Round.from_json(line) for line in told["history"]]

    def map_sum(self, work: Any, indices: Sequence[int]) -> Stats | None:
        """The sum of the statistics of all ranks' clients.

        Args:
            work: a RoundWork; its records are in the end those of all clients, in the order of `indices`.
            indices: the cohort.
        """
        ranks, total, store = self._ranks(), Total(), work.store
        shares = self.costs.dealt(indices, ranks.count)
        mine = shares[ranks.number]
        some = self.leads and store.holds_any()
        handed = unpacked(ranks.hand_out(lambda rank: states(work.store, map(work.key, shares[rank])) if some else b""))
        if not self.leads:
            work.store = MemoryStore()
            for index, state in handed.items():
                work.store.save(index, work.number - 1, state)

        def part() -> bytes:
            for upload in Sequential(threads=1).uploads(work, mine):
                if (stats := work.receive(upload)) is not None:
                    total.add(stats)
            rows = [[index, asdict(record)] for index, record in zip(mine, work.records, strict=True)]
            head = {"eta": work.digest(), "layout": total.layout, "clients": total.clients, "rows": rows}
            return json.dumps(head).encode() + b"\n" + (b"" if self.leads else new_states(work))

        def merge(parts: Sequence[bytes]) -> bytes:
            heads, new = zip(*(part.split(b"\n", 1) for part in parts), strict=True)
            merged = _merged([json.loads(head) for head in heads], indices)
            for index, state in (item for states_of in new for item in unpacked(states_of).items()):
                store.save(index, work.number, state)
            return json.dumps(merged).encode()

        told = json.loads(ranks.together(part, merge))
        self._keep(work, told["rows"])
        if not told["layout"]:
            return None
        values = total.values if total.layout else zeros(told["layout"], work.device)
        ranks.add(values)
        return rounded(values, told["layout"], told["clients"])

    def _keep(self, work: Any, rows: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """The records of all ranks, and what clients cost that have trained."""
        work.records[:] = [ClientRecord(**fields) for _, fields in rows]
        for (index, _), record in zip(rows, work.records, strict=True):
            if record.status in ("ok", "rejected"):
                self.costs.saw(index, record.seconds)

    def evaluate(self, objective: Objective, phi: Params | Predictive, test: Examples) -> Sums:
        """The sums of all ranks, each over a share of the examples."""
        ranks = self._ranks()
        low, high = (len(test) * rank // ranks.count for rank in (ranks.number, ranks.number + 1))

        def part() -> bytes:
            mine = Examples(test.x[low:high], test.y[low:high])
            return json.dumps(asdict(evaluate(objective, phi, mine)) if len(mine) else None).encode()

        def merge(parts: Sequence[bytes]) -> bytes:
            first, *others = (Sums(**sums) for part in parts if (sums := json.loads(part)) is not None)
            return json.dumps(asdict(sum(others, first))).encode()

        return Sums(**json.loads(ranks.together(part, merge)))

    def close(self) -> None:
        """Leave the other ranks."""
        if self._joined is not None:
            self._joined.leave()
            self._joined = None

    def _ranks(self) -> Ranks:
        if self._joined is None:
            self._joined = Ranks.join(self.timeout_seconds)
        return self._joined


def _merged(heads: Sequence[dict[str, Any]], indices: Sequence[int]) -> dict[str, Any]:
    """What the ranks' reports say together."""
    for rank, head in enumerate(heads):
        if head["eta"] != heads[0]["eta"]:
            raise ValueError(f"rank {rank} has another eta than rank 0: are the machines' processors of one kind?")
    layouts = [head["layout"] for head in heads if head["layout"]]
    check_same(layouts)
    place = {index: position for position, index in enumerate(indices)}
    rows = sorted((row for head in heads for row in head["rows"]), key=lambda row: place[row[0]])
    clients = sum(head["clients"] for head in heads)
    return {"layout": layouts[0] if layouts else [], "clients": clients, "rows": rows}
