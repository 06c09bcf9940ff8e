"""One round's work: the client's side and the server's side of the wire, as an engine runs them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

from fedprior import tree, wire
from fedprior.algorithm import Algorithm
from fedprior.codecs import PayloadError
from fedprior.cohort import Availability
from fedprior.core import Client, Eta, Params, Population, Schema, Stats
from fedprior.objective import Objective
from fedprior.records import ClientRecord, Status
from fedprior.rng import generator
from fedprior.store import ClientStore


@dataclass(frozen=True)
class Upload:
    """What comes back from a client: a payload, or the reason why there is none.

    The personal state (empty: none) does not travel in a real federation; here it is handed to the store.
    """

    index: int
    client: str
    examples: int
    status: Status
    payload: bytes = b""
    state: Params = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class RoundWork:
    """Round `number`, from the encoded eta to the sum's terms.

    Attributes:
        down: the payload that every client of the cohort receives.
        down_schema: what eta's message looks like.
        up_schema: what a client's message must look like.
        records: filled by `receive`, one a client.
    """

    algorithm: Algorithm
    objective: Objective
    population: Population
    store: ClientStore
    availability: Availability
    seed: int
    number: int
    like: Eta
    down: bytes
    down_schema: Schema
    up_schema: Schema
    device: str = "cpu"
    records: list[ClientRecord] = field(default_factory=list)

    @cached_property
    def eta(self) -> Eta:
        """eta as the clients see it: decoded, once per process."""
        codec = self.algorithm.downlink or self.algorithm.codec
        message, _ = codec.decode(self.down, self.down_schema)
        return tree.unflatten(self.like, {k: v.to(self.device) for k, v in message.items()})

    def client(self, index: int) -> Upload:
        """Receive, train, send."""
        client = self.population[index]
        examples = len(client.train)
        status = self.availability.status(self.seed, self.number, client.index, examples)
        if status != "ok":
            return Upload(client.index, client.name, examples, status)
        started = time.perf_counter()
        try:
            payload, state = self._train(client)
        except Exception as error:
            error.add_note(f"in round {self.number}, client {client.name!r} (index {client.index}), seed {self.seed}")
            raise
        return Upload(client.index, client.name, examples, "ok", payload, state, time.perf_counter() - started)

    def _train(self, client: Client) -> tuple[bytes, Params]:
        """The E-step: the encoded statistics, and the next personal state."""
        if len(client.train) == 0:
            raise ValueError(f"client {client.name!r} has no training examples: leave it out of the population")
        on_device = Client(client.index, client.name, client.train.to(self.device), client.held_out)
        rng = generator(self.seed, self.number, client.index, "e_step")
        algorithm, state = self.algorithm, self.store.load(client.index)
        own, residual = (wire.part(state, name, self.device) for name in ("e_step", "residual"))
        q, own = algorithm.inference.e_step(self.objective, algorithm.prior, self.eta, on_device, own, rng)
        stats, weight = algorithm.message(self.eta, q), algorithm.weight(client)
        payload, residual = wire.encode(algorithm, self.eta, stats, weight, residual)
        return payload, wire.join({"e_step": own, "residual": residual})

    def receive(self, upload: Upload) -> Stats | None:
        """Decode and check; a payload that is refused is recorded with the reason, and the round goes on.

        A client's personal state goes on with the server: it is that of the last upload that was accepted.
        """
        status, reason, stats = upload.status, "", None
        if status == "ok":
            try:
                stats = self._decode(upload)
            except PayloadError as error:
                status, reason = "rejected", str(PayloadError(error.reason, upload.client))
        if stats is not None and upload.state:
            self.store.save(upload.index, self.number, upload.state)
        self.records.append(
            ClientRecord(
                upload.index,
                upload.client,
                status,
                upload.examples,
                len(self.down),
                len(upload.payload),
                upload.seconds,
                reason,
            )
        )
        return stats

    def _decode(self, upload: Upload) -> Stats:
        stats = wire.decode(self.algorithm, self.eta, upload.payload, self.up_schema, self.device)
        expected = float(upload.examples) if self.algorithm.weighting == "examples" else 1.0
        if stats.clients != expected:
            raise PayloadError(f"count of clients is {stats.clients}, and this client stands for {expected}")
        return stats
