"""One round's work: the client's side and the server's side of the wire, as an engine runs them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fedprior import tree, wire
from fedprior.algorithm import Algorithm
from fedprior.codecs import PayloadError
from fedprior.cohort import Availability
from fedprior.core import Client, Eta, Params, Population, Schema, Stats
from fedprior.layer import Finished, Setting
from fedprior.objective import Objective
from fedprior.records import ClientRecord, Status
from fedprior.rng import generator
from fedprior.store import ClientStore


@dataclass(frozen=True)
class Upload:
    """What comes back from a client: a payload, or the reason why there is none.

    The personal state (empty: none) does not travel in a real federation; here it is handed to the store. `bytes_down`
    is the length of the payload that the client was sent; seconds are those of the E-step, and of the wire; `reason`
    says what went wrong on the way, if anything did.
    """

    index: int
    client: str
    examples: int
    status: Status
    bytes_down: int
    payload: bytes = b""
    state: Params = field(default_factory=dict)
    seconds: float = 0.0
    seconds_wire: float = 0.0
    reason: str = ""

    def record(self, status: Status, reason: str, seconds_wire: float) -> ClientRecord:
        """The line in the round's record, after the server's side has taken `seconds_wire` more."""
        return ClientRecord(
            self.index,
            self.client,
            status,
            self.examples,
            self.bytes_down,
            len(self.payload),
            self.seconds,
            reason,
            self.seconds_wire + seconds_wire,
        )


def check_examples(client: str, examples: int) -> None:
    """A ValueError for a client that has nothing to train on."""
    if examples == 0:
        raise ValueError(f"client {client!r} has no training examples: leave it out of the population")


@dataclass
class RoundWork:
    """Round `number`, from the encoded eta to the sum's terms.

    Attributes:
        like: the server's eta.
        down: the payload that every client of the cohort receives; empty if the prior draws an eta for each.
        up_schema: what a client's message looks like in round one, and in all rounds unless eta shrinks.
        rounds, cohort: of the whole run, from which a node of a federation makes the same plan (planning.py).
        layer: between uploads and sum (layer.py); None for most algorithms.
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
    up_schema: Schema
    device: str = "cpu"
    rounds: int = 1
    cohort: int = 1
    layer: Any = None
    records: list[ClientRecord] = field(default_factory=list)

    def begin(self, server: Params, indices: Sequence[int]) -> RoundWork:
        """The work with the layer of this round, if the algorithm has one; `indices` are of the cohort."""
        if not self.algorithm.layered:
            return self
        clients = [self.population[i] for i in indices] if self.algorithm.secure else []
        stages = {c.index: self.availability.stage(self.seed, self.number, c.index, self._status(c)) for c in clients}
        setting = Setting(self.algorithm, self.schema, self.cohort, self.seed)
        return replace(self, layer=setting.layer(self.number, self.common, server, stages))

    def _status(self, client: Client) -> Status:
        return self.availability.status(self.seed, self.number, client.index, len(client.train))

    def changes(self) -> tuple[int, bytes, Params, Any]:
        """What differs from round to round, and a copy of an earlier round's work in another process lacks."""
        layer = self.layer and self.layer.public()
        return self.number, self.down, tree.flatten(self.like) if self.algorithm.samples else {}, layer

    def changed(self, changes: tuple[int, bytes, Params, Any]) -> RoundWork:
        """The work of the round that `changes` come from. Without samples, eta serves for its names alone."""
        number, down, flat, layer = changes
        like = tree.unflatten(self.like, flat) if flat else self.like
        return replace(self, number=number, down=down, like=like, layer=layer, records=[])

    def digest(self) -> int:
        """Of the round's number and the server's eta: processes that have the same one have the same etas."""
        return tree.digest(tree.flatten(self.like), self.number)

    def key(self, index: int) -> int:
        """The client's own index, by which the store knows it, from its position in the population."""
        return self.population[index].index

    def sent(self, index: int) -> Eta:
        """The eta of one client, by its own index, before it is encoded: drawn again whenever it is asked for."""
        return self.algorithm.sample(self.like, generator(self.seed, self.number, index, "downlink"))

    def downlink(self, index: int) -> bytes:
        """The payload of one client. The server's work, here done where the client runs."""
        return self.down or wire.encode_eta(self.algorithm, self.sent(index))

    @cached_property
    def common(self) -> Eta:
        """eta as all clients see it: decoded, once per process."""
        return self._received(self.down)

    @cached_property
    def schema(self) -> Schema:
        """What a client's message must look like."""
        shrinks = getattr(self.algorithm.prior, "index", ())
        return wire.message_schema(self.algorithm, self.common) if shrinks else self.up_schema

    def _received(self, payload: bytes) -> Eta:
        return wire.decode_eta(self.algorithm, self.like, payload, self.device)

    def _eta(self, payload: bytes) -> Eta:
        return self.common if payload is self.down else self._received(payload)

    def client(self, index: int) -> Upload:
        """Receive, train, send."""
        client = self.population[index]
        if self.layer is not None and self.layer.seals and client.index in self.layer.lost:
            return Upload(
                client.index, client.name, len(client.train), "dropped", 0, reason=self.layer.lost[client.index]
            )
        status, down = self._status(client), self.downlink(client.index)
        if status != "ok":
            return Upload(client.index, client.name, len(client.train), status, len(down))
        try:
            return self._train(client, down)
        except Exception as error:
            error.add_note(f"in round {self.number}, client {client.name!r} (index {client.index}), seed {self.seed}")
            raise

    def _train(self, client: Client, down: bytes) -> Upload:
        """Decode eta, the E-step, encode the statistics."""
        check_examples(client.name, len(client.train))
        began = time.perf_counter()
        algorithm, eta, state = self.algorithm, self._eta(down), self.store.load(client.index)
        own, kept, residual = (wire.part(state, name, self.device) for name in ("e_step", "kept", "residual"))
        on_device = Client(client.index, client.name, client.train.to(self.device), client.held_out)
        rng = generator(self.seed, self.number, client.index, "e_step")
        started = time.perf_counter()
        q, own, kept = algorithm.e_step(self.objective, eta, on_device, own, kept, rng)
        seconds = time.perf_counter() - started
        stats, weight = wire.ordered(algorithm.message(eta, q), self.schema), algorithm.weight(len(client.train))
        if self.layer is not None and self.layer.seals:
            payload, residual = self.layer.seal(eta, stats, weight, client.index), {}
        else:
            payload, residual = wire.encode(algorithm, eta, stats, weight, residual)
        state = wire.join({"e_step": own, "kept": kept, "residual": residual})
        wired = time.perf_counter() - began - seconds
        return Upload(client.index, client.name, len(client.train), "ok", len(down), payload, state, seconds, wired)

    def receive(self, upload: Upload) -> Stats | None:
        """Decode and check; a payload that is refused is recorded with the reason, and the round goes on.

        A client's personal state goes on with the server: it is that of the last upload that was accepted.
        """
        status, reason, stats, began = upload.status, upload.reason, None, time.perf_counter()
        if status == "ok":
            try:
                stats = self._decode(upload)
            except PayloadError as error:
                status, reason = "rejected", str(PayloadError(error.reason, upload.client))
        if stats is not None and upload.state:
            self.store.save(upload.index, self.number, upload.state)
        self.records.append(upload.record(status, reason, time.perf_counter() - began))
        return stats

    def _decode(self, upload: Upload) -> Stats:
        if self.layer is not None and self.layer.seals:
            return self.layer.open(upload.payload)
        asked = self.algorithm.delta or self.layer is not None
        eta = self._eta(self.downlink(upload.index)) if asked else None  # nothing else asks for it
        stats = wire.decode(self.algorithm, eta, upload.payload, self.schema, self.device)
        expected = self.algorithm.weight(upload.examples)
        if stats.clients != expected:
            raise PayloadError(f"count of clients is {stats.clients}, and this client stands for {expected}")
        stats = self.algorithm.accept(self.sent(upload.index), stats)
        return stats if self.layer is None else self.layer.receive(eta, stats, upload.client)

    def finish(self, total: Stats | None) -> Finished:
        """What the server's step goes by."""
        if self.layer is None:
            return Finished(total, "" if total else "no client's statistics arrived", tuple(self.records))
        return self.layer.finish(self.common, total, self.records)
