"""The engine of a real federation: a round's clients train on Flower's nodes.

    fedprior.run(algorithm, model, roster, rounds=..., engine=GridEngine(grid, nodes=3), out=...)

is a whole server. One message goes to each node that has clients of the cohort; the uploads are received in the order
of the cohort, so that the sum has the bits of the sequential engine's. What does not come before the deadline is late,
and the round goes on.

Nodes are told apart by the partition that they claim. The first node of a partition keeps it for as long as it is
there; who may join at all is decided by Flower, by keys (docs/federation.md).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedprior.cohort import Availability
from fedprior.core import Client, Examples, Stats, Work
from fedprior.engines.sequential import summed
from fedprior.federation import bundle, replies
from fedprior.federation.node import about
from fedprior.federation.replies import Asked
from fedprior.federation.secure_server import Exchange
from fedprior.layer import LAYERS
from fedprior.records import Round
from fedprior.round import RoundWork, Upload
from fedprior_node import mail

log = logging.getLogger(__name__)
Request = Callable[[Sequence[Client]], tuple[bytes, dict[int, Asked]]]
"""One node's message, and what its clients were sent."""


class NodeError(RuntimeError):
    """A node that cannot take part, before round one."""


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
        history: rounds of the run before it was resumed.
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
    _claims: dict[int, int] = field(default_factory=dict, repr=False)  # node -> partition, -1 for a useless node
    _places: dict[int, int] = field(default_factory=dict, repr=False)  # partition -> node
    _hellos: dict[str, int] = field(default_factory=dict, repr=False)  # message -> node
    _met: bool = field(default=False, repr=False)
    layers = LAYERS

    def map_sum(self, work: Work, indices: Sequence[int]) -> Stats | None:
        """The sum of the clients' statistics in the order of `indices`."""
        if not isinstance(work, RoundWork):
            raise TypeError(f"GridEngine runs the rounds of fedprior.run, got {type(work).__name__}")
        if work.availability != Availability():
            raise ValueError("a federation's clients are late or lost by themselves: leave out availability=")
        for record in () if self._met else self.history:
            if record.number < work.number:  # a crash may have left one that will be run again
                self._remember(record.number, record.clients)
        self._meet(work)
        total = summed(work, self._of_round(work, [work.population[i] for i in indices]))
        self._remember(work.number, work.records)
        for record in work.records:
            if record.status != "ok":
                log.warning("round %d, %s: %s: %s", work.number, record.client, record.status, record.reason)
        return total

    def _remember(self, number: int, records: Sequence[Any]) -> None:
        self._accepted.update({record.index: number for record in records if record.status == "ok"})

    def _meet(self, work: RoundWork) -> None:
        """Find out which node is which partition: wait for all of them before round one, for one of them later."""
        end = time.monotonic() + self.seconds
        while True:
            present = set(self.grid.get_node_ids())
            self._greet(present, work)
            self._seat(present)
            missing = [p for p in range(self.nodes) if p not in self._places]
            if not missing or (self._met and self._places):
                break
            if time.monotonic() > end:
                if self._met:
                    break
                raise NodeError(
                    f"after {self.seconds:g} s there is no node of the partitions {missing}: start the SuperNodes "
                    f'with --node-config "partition-id={missing[0]} num-partitions={self.nodes}"'
                )
            time.sleep(self.poll)
        self._met = True

    def _greet(self, present: set[int], work: RoundWork) -> None:
        """Ask nodes that are new who they are, and hear those that were asked."""
        asked = set(self._hellos.values())
        if new := sorted(present - self._claims.keys() - asked):
            hello = bundle.pack({"ask": "hello", **self._header(work)})
            sent = self.grid.push_messages([mail.request(n, work.number, hello, self.seconds + 60) for n in new])
            self._hellos |= dict(zip(sent, new, strict=True))
        for message in self.grid.pull_messages(list(self._hellos)) if self._hellos else ():
            node = self._hellos.pop(message.metadata.reply_to_message_id, None)
            if node is not None:
                self._claims[node] = self._hear(node, message, work)

    def _hear(self, node: int, message: Any, work: RoundWork) -> int:
        """The partition that a node claims. One that cannot take part ends the run before round one; later it is -1."""
        try:
            if message.has_error():
                raise ValueError(f"Flower's error {message.error.code}: {message.error.reason}")
            said = replies.hello(mail.blob(message))
            if said["partitions"] != self.nodes or not 0 <= said["partition"] < self.nodes:
                raise ValueError(f"it is partition {said['partition']} of {said['partitions']}, not of {self.nodes}")
            for key, mine in about(work).items():
                if said.get(key) != mine:
                    raise ValueError(f"its {key} is {str(said.get(key))[:300]}, and the server's is {str(mine)[:300]}")
            if not self._met and said["partition"] in self._claims.values():
                raise ValueError(f"another node is partition {said['partition']} as well: give each its own")
            return said["partition"]
        except ValueError as error:
            if not self._met:
                raise NodeError(f"node {node} cannot take part: {error}") from error
            log.warning("node %d cannot take part: %s", node, error)
            return -1

    def _seat(self, present: set[int]) -> None:
        """The first node of a partition keeps it while it is there."""
        self._places = {p: n for p, n in self._places.items() if n in present}
        for node, partition in self._claims.items():
            if node in present and partition >= 0:
                self._places.setdefault(partition, node)

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
        asked, messages, sent_to = {}, [], []
        for partition, clients in by_partition.items():
            node = self._places.get(partition)
            if node is None:
                nobody = {c.index: Asked(c.name, 0) for c in clients}
                yield partition, replies.failed(nobody, "dropped", f"there is no node of partition {partition}")
                continue
            blob, asked[partition] = request(clients)
            messages.append(mail.request(node, work.number, blob, self.seconds + 60))
            sent_to.append(partition)
        waiting = dict(zip(self.grid.push_messages(messages) if messages else (), sent_to, strict=True))
        end = time.monotonic() + self.seconds
        while waiting and time.monotonic() < end:
            for message in self.grid.pull_messages(list(waiting)):
                partition = waiting.pop(message.metadata.reply_to_message_id, None)
                if partition is not None:
                    yield partition, self._read(work, message, asked[partition])
            if waiting:
                time.sleep(self.poll)
        for partition in waiting.values():
            yield partition, replies.failed(asked[partition], "late", f"no answer within {self.seconds:g} s")

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

    def _read(self, work: RoundWork, message: Any, asked: Mapping[int, Asked]) -> replies.Reply:
        """A reply from Flower: an error of its own, or a blob."""
        if message.has_error():
            reason = f"Flower's error {message.error.code}: {message.error.reason}"
            return replies.failed(asked, "dropped", reason)
        try:
            blob = mail.blob(message)
        except ValueError as error:
            return replies.failed(asked, "rejected", f"the node's reply {error}")
        return replies.read(blob, asked, 0 if work.algorithm.secure else self.most_examples)
