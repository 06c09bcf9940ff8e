"""The engine of a real federation: a round's clients train on Flower's nodes.

    fedprior.run(algorithm, model, roster, rounds=..., engine=GridEngine(grid, nodes=3), out=...)

is a whole server. One message goes to each node that has clients of the cohort; the uploads are received in the order
of the cohort, so that the sum has the bits of the sequential engine's. What does not come before the deadline is late,
and the round goes on.

Which node has which clients is in seats.py, how blobs travel in post.py and flower.py.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedprior.cohort import Availability
from fedprior.core import Client, Examples, Stats, Work
from fedprior.engines.sequential import summed
from fedprior.federation import bundle, replies
from fedprior.federation.flower import GridPost
from fedprior.federation.post import Failure, answers
from fedprior.federation.replies import Asked
from fedprior.federation.seats import Seats
from fedprior.federation.secure_server import Exchange
from fedprior.layer import LAYERS
from fedprior.records import Round
from fedprior.round import RoundWork, Upload

log = logging.getLogger(__name__)
Request = Callable[[Sequence[Client]], tuple[bytes, dict[int, Asked]]]
"""One node's message, and what its clients were sent."""


@dataclass(frozen=True)
class Roster:
    """A federation's clients as the server knows them: how many, and what an example looks like."""

    count: int
    example: Examples

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a federation needs at least 1 client, got {self.count}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Client:
        if not 0 <= index < self.count:
            raise IndexError(f"client {index} of a federation of {self.count}")
        return Client(index, f"client-{index}", self.example)


@dataclass
class GridEngine:
    """Clients on the nodes of a Flower grid.

    Attributes:
        grid: Flower's.
        nodes: how many partitions there are; all must be there before round one.
        run: key of the run, under which nodes keep personal states.
        seconds: that the nodes have before round one, and for each exchange: one a round, four under secure=...
        poll: seconds between two looks for replies.
        most_examples: that a client may claim to have: examples are weights.
        history: rounds of the run before it was resumed. Checkpoint every round, the default of run: a client whose
            state is of a later round than it is asked for takes the request for a late one, and fails.
        secret: 256 bits that the server's noise derives from under privacy=...; nodes know the run's seed.
    """

    grid: Any
    nodes: int
    run: str = "run"
    seconds: float = 600.0
    poll: float = 0.2
    most_examples: int = 1_000_000
    history: Sequence[Round] = ()
    secret: int = field(default_factory=lambda: secrets.randbits(256), repr=False)
    _accepted: dict[int, int] = field(default_factory=dict, repr=False)
    _seats: Seats = field(init=False, repr=False)
    layers = LAYERS

    def __post_init__(self) -> None:
        self._seats = Seats(GridPost(self.grid), self.nodes, self.seconds, self.poll)

    def map_sum(self, work: Work, indices: Sequence[int]) -> Stats | None:
        """The sum of the clients' statistics in the order of `indices`."""
        if not isinstance(work, RoundWork):
            raise TypeError(f"GridEngine runs the rounds of fedprior.run, got {type(work).__name__}")
        if work.availability != Availability():
            raise ValueError("a federation's clients are late or lost by themselves: leave out availability=")
        for record in () if self._seats.met else self.history:
            if record.number < work.number:  # a crash may have left one that will be run again
                self._remember(record.number, record.clients)
        self._seats.meet(work, bundle.pack({"ask": "hello", **self._header(work)}))
        total = summed(work, self._of_round(work, [work.population[i] for i in indices]))
        self._remember(work.number, work.records)
        for record in work.records:
            if record.status != "ok":
                log.warning("round %d, %s: %s: %s", work.number, record.client, record.status, record.reason)
        return total

    def _remember(self, number: int, records: Sequence[Any]) -> None:
        self._accepted.update({record.index: number for record in records if record.status == "ok"})

    def _of_round(self, work: RoundWork, clients: Sequence[Client]) -> Iterator[Upload]:
        """The uploads of a round, which under secure=... takes several exchanges."""
        if work.algorithm.secure is None:
            if work.algorithm.privacy is not None:
                work.layer = replace(work.layer, seed=self.secret)
            return self.uploads(work, clients, lambda some: self._round(work, some))
        exchange = Exchange(self, work, clients)
        work.layer = replace(work.layer, parties=exchange)
        return exchange.uploads()

    def uploads(self, work: RoundWork, clients: Sequence[Client], request: Request) -> Iterator[Upload]:
        """What came of the clients, in their order; then what nobody asked for."""
        by_partition: dict[int, list[Client]] = {}
        for client in clients:
            by_partition.setdefault(client.index % self.nodes, []).append(client)
        arrived: dict[int, Upload] = {}
        strange: list[Upload] = []
        todo = [client.index for client in clients]
        for partition, reply in self._exchange(work, by_partition, request):
            arrived |= reply.uploads
            if reply.strange:
                strange.append(Upload(-1, f"node of partition {partition}", 0, "rejected", 0, reason=reply.strange))
            while todo and todo[0] in arrived:
                yield arrived.pop(todo.pop(0))
        yield from strange

    def _exchange(
        self, work: RoundWork, by_partition: Mapping[int, list[Client]], request: Request
    ) -> Iterator[tuple[int, replies.Reply]]:
        """Send, and give each partition's reply as it comes; in the end those that did not come."""
        asked, blobs, partitions = {}, {}, {}
        for partition, clients in by_partition.items():
            node = self._seats.places.get(partition)
            if node is None:
                nobody = {c.index: Asked(c.name, 0) for c in clients}
                yield partition, replies.failed(nobody, "dropped", f"there is no node of partition {partition}")
                continue
            blobs[node], asked[node] = request(clients)
            partitions[node] = partition
        for node, answer in answers(self._seats.post, work.number, blobs, self.seconds, self.poll):
            yield partitions[node], self._read(work, answer, asked[node])

    def _round(self, work: RoundWork, clients: Sequence[Client]) -> tuple[bytes, dict[int, Asked]]:
        """One node's message: the broadcast once, or what each client receives."""
        parts = [work.downlink(c.index) for c in clients] if work.algorithm.samples else [work.down]
        asked = {c.index: Asked(c.name, len(parts[k % len(parts)])) for k, c in enumerate(clients)}
        return self.blob(work, "round", clients, parts), asked

    def blob(self, work: RoundWork, ask: str, clients: Sequence[Client], parts: Sequence[bytes]) -> bytes:
        """A request to one node."""
        last = [[c.index, self._accepted.get(c.index, 0)] for c in clients]
        return bundle.pack({"ask": ask, **self._header(work), "number": work.number, "clients": last}, parts)

    def _header(self, work: RoundWork) -> dict[str, Any]:
        header = {"run": self.run, "seed": work.seed, "rounds": work.rounds, "cohort": work.cohort}
        privacy = work.algorithm.privacy
        noise, clip = (privacy.noise_multiplier, work.layer.most) if privacy else (None, 0.0)
        return header | {"population": len(work.population), "noise": noise, "clip": clip}

    def _read(self, work: RoundWork, answer: bytes | Failure, asked: Mapping[int, Asked]) -> replies.Reply:
        """A node's answer: a blob, or why there is none."""
        if isinstance(answer, Failure):
            reason = f"the node's reply {answer.reason}" if answer.status == "rejected" else answer.reason
            return replies.failed(asked, answer.status, reason)
        return replies.read(answer, asked, 0 if work.algorithm.secure else self.most_examples)
