"""A node: runs the clients that live on it, one request of the server after the other.

Client i of the federation lives on the node of partition i % partitions. A request names the clients and what they
receive; the reply has one entry a client, with its payload or with the text of the error that its training raised.

Under secure=... a round is several requests, and uploads are masked: secure_node.py.

A client's personal state stays on the node's disk, in `state`/RUN/client-I, and is that of the client's last upload
which the server accepted: a request says which round that was.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

import fedprior
from fedprior import planning
from fedprior.algorithm import Algorithm
from fedprior.cohort import Availability
from fedprior.core import Client, Params, Population
from fedprior.engines.sequential import torch_threads
from fedprior.federation import bundle, secure_node
from fedprior.losses import Loss, PerExample
from fedprior.objective import Objective
from fedprior.round import RoundWork
from fedprior.store import DiskStore, MemoryStore

Own = Population | Sequence[Client] | Mapping[int, Client]
Data = Own | Callable[[int, int], Own]
"""Clients by their index in the federation, or (partition, partitions) -> the clients of that partition's node."""

HIDDEN = {"examples": 0, "seconds": 0.0, "seconds_wire": 0.0}  # under secure=..., as they tell of a client's data
TEXT, LONGEST = 4000, 1 << 26  # characters of an error that travels; bytes of a request's header


@dataclass
class Node:
    """What one SuperNode runs.

    Attributes:
        algorithm, model, loss: the server's.
        data: the clients. All of a federation's, of which a node takes its own, serve for a trial on one machine.
        state: folder of personal states, one subfolder a run; nothing is written for algorithms that have none.
        threads: PyTorch's threads while a client trains.
    """

    algorithm: Algorithm
    data: Data
    model: nn.Module
    loss: str | Loss | PerExample = "classification"
    state: str | Path = "~/.fedprior/states"
    device: str = "cpu"
    threads: int = 1
    _own: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False)
    _made: tuple[Any, RoundWork] | None = field(default=None, repr=False)

    def answer(self, request: bytes, partition: int, partitions: int) -> bytes:
        """The reply to one request; an error of this node's is the text of the reply."""
        try:
            header, parts = bundle.unpack(request, LONGEST)
            if header.get("ask") == "hello":
                return bundle.pack({"hello": self._hello(header, partition, partitions)})
            if self.algorithm.secure is not None:
                return self._secure(header, parts, partition, partitions)
            return self._round(header, parts, partition, partitions)
        except Exception as error:
            return bundle.pack({"failed": text(error)})

    def _hello(self, header: dict[str, Any], partition: int, partitions: int) -> dict[str, Any]:
        """Who this is and what it would run; the data are loaded and the plan is made on the way."""
        own = self._clients(partition, partitions)
        _check_all_here(own, partition, partitions, header["population"])
        work = self._work(header, own, partition)
        return {"partition": partition, "partitions": partitions, **about(work)}

    def _clients(self, partition: int, partitions: int) -> Any:
        """The node's clients, by index."""
        if (partition, partitions) not in self._own:
            own = self.data(partition, partitions) if callable(self.data) else self.data
            if isinstance(own, list | tuple):
                own = {client.index: client for client in own}
            if len(own) == 0:
                raise ValueError(f"the node of partition {partition} of {partitions} has no clients")
            self._own[partition, partitions] = own
        return self._own[partition, partitions]

    def _secure(self, header: dict[str, Any], parts: list[bytes], partition: int, partitions: int) -> bytes:
        """The reply to one stage of a round whose uploads are masked."""
        if strangers := [i for i, _ in header["clients"] if i % partitions != partition]:
            raise ValueError(f"clients {strangers[:5]} do not live on the node of partition {partition}")
        path = Path(self.state).expanduser() / run_key(header["run"]) / "secure" / f"partition-{partition}"
        made = secure_node.answer(header, parts, path)
        if isinstance(made, secure_node.Session):
            return self._round(header, parts[:1], partition, partitions, made)
        entries, payloads = [], []
        for index, _ in header["clients"]:
            entry, payload = {"client": index, "status": "ok", **HIDDEN}, b""
            try:
                payload = made(index)
            except ValueError as error:
                entry = {"client": index, "status": "failed", "reason": text(error)}
            entries.append(entry)
            payloads.append(payload)
        return bundle.pack({"clients": entries}, payloads)

    def _round(
        self,
        header: dict[str, Any],
        parts: list[bytes],
        partition: int,
        partitions: int,
        session: secure_node.Session | None = None,
    ) -> bytes:
        """The reply to a request to train; `session` masks the uploads."""
        clients = self._clients(partition, partitions)
        folder = Path(self.state).expanduser() / run_key(header["run"])
        store = NodeStore(folder, header["number"], dict(header["clients"]))
        entries, payloads, work = [], [], None
        for place, (index, _) in enumerate(header["clients"]):
            down = parts[place % len(parts)]  # one for all, or one each
            if work is None or down is not work.down:
                work = self._work(header, clients, partition).changed((header["number"], down, {}, None))
                work.store, work.population = store, clients
                work.layer = session and session.layer(work, header["clip"])
            entry, payload = self._train(work, store, index, partition, partitions)
            entries.append(entry)
            payloads.append(payload)
        return bundle.pack({"clients": entries}, payloads)

    def _work(self, header: dict[str, Any], clients: Any, partition: int) -> RoundWork:
        """The run's work; the plan is made again when the run is another one."""
        key = tuple(header[name] for name in ("run", "seed", "rounds", "cohort", "population", "noise"))
        if self._made is None or self._made[0] != key:
            objective = Objective(self.model, self.loss, self.device)
            x = clients[next(iter(clients)) if isinstance(clients, Mapping) else partition].train.x[:1].to(self.device)
            algorithm, eta, up_schema = planning.prepare(
                private(self.algorithm, header), objective, x, header["rounds"], header["cohort"]
            )
            self._made = (
                key,
                RoundWork(
                    algorithm=algorithm,
                    objective=objective,
                    population=clients,
                    store=MemoryStore(),
                    availability=Availability(),
                    seed=header["seed"],
                    number=0,
                    like=eta,
                    down=b"",
                    up_schema=up_schema,
                    device=self.device,
                ),
            )
        return self._made[1]

    def _train(
        self, work: RoundWork, store: NodeStore, index: int, partition: int, partitions: int
    ) -> tuple[dict[str, Any], bytes]:
        """One client's entry and payload."""
        try:
            if index % partitions != partition:
                raise ValueError(f"client {index} does not live on the node of partition {partition} of {partitions}")
            with torch_threads(self.threads):
                upload = work.client(index)
            if upload.client and upload.index != index:
                raise ValueError(f"the data give client {upload.index} for client {index}")
            store.save(index, work.number, upload.state)
        except Exception as error:
            return {"client": index, "status": "failed", "reason": text(error)}, b""
        told = {"examples": upload.examples, "seconds": upload.seconds, "seconds_wire": upload.seconds_wire}
        return {"client": index, "status": "ok", **(HIDDEN if work.layer else told)}, upload.payload


def _check_all_here(own: Any, partition: int, partitions: int, population: int) -> None:
    """Are this node's clients those of a federation of `population`?"""
    if isinstance(own, Mapping):
        here, wanted = sorted(i for i in own if i % partitions == partition), range(partition, population, partitions)
        same, found, asked = here == list(wanted), f"the clients {_listed(here)}", _listed(wanted)
    else:
        same, found, asked = len(own) == population, f"a federation of {len(own)} clients", f"one of {population}"
    if not same:
        raise ValueError(
            f"the node of partition {partition} of {partitions} has {found}, and the server's run with "
            f"clients={population} asks for {asked}: write the same number there and in the node's data"
        )


def _listed(indices: Sequence[int]) -> str:
    """The first few."""
    return f"{', '.join(map(str, indices[:5]))}{', ...' if len(indices) > 5 else ''} ({len(indices)})"


@dataclass
class NodeStore:
    """The states of one run's clients in round `number`; `last` is the round of each client's last accepted upload."""

    folder: Path
    number: int
    last: Mapping[int, int]

    def holds_any(self) -> bool:
        """Is there a state of any client?"""
        return any(self.folder.glob("client-*/*.safetensors"))

    def _of(self, index: int) -> DiskStore | None:
        folder = self.folder / f"client-{index}"
        return DiskStore(folder) if folder.exists() else None

    def load(self, index: int) -> Params | None:
        """The state after the last accepted upload; what came after it is forgotten.

        A ValueError for a request that comes after a later one, as when a SuperNode had stopped: it does not know
        which upload was the last.
        """
        store = self._of(index)
        if store is None:
            return None
        if (newest := store.newest(index)) > self.number:
            raise ValueError(f"round {self.number} is over for client {index}, whose state is of round {newest}")
        store.rollback(self.last[index])
        return store.load(index)

    def save(self, index: int, number: int, state: Params) -> None:
        """Keep a state beside the last accepted one: the server has not accepted this one yet."""
        if state:
            store = DiskStore(self.folder / f"client-{index}")
            store.save(index, number, state)
            store.commit(self.last[index])

    def commit(self, number: int) -> None:
        """Nothing: what the server has accepted is in `last`, and `save` and `load` go by it."""

    def rollback(self, number: int) -> None:
        """Nothing, for the same reason."""


def private(algorithm: Algorithm, header: Mapping[str, Any]) -> Algorithm:
    """With the noise that the server found for the run, where the algorithm names none."""
    privacy = algorithm.privacy
    if privacy is None:
        return algorithm
    noise = header["noise"] if privacy.noise_multiplier is None else privacy.noise_multiplier
    known = {"cohort": header["cohort"], "population": header["population"], "noise_multiplier": noise}
    return replace(algorithm, privacy=replace(privacy, **known))


def about(work: RoundWork) -> dict[str, Any]:
    """What the server and its nodes must have in common."""
    return {
        "version": fedprior.__version__,
        "algorithm": str(work.algorithm),
        "loss": str(work.objective.loss),
        "parameters": {k: f"{tuple(v.shape)} {v.dtype}" for k, v in work.objective.params().items()},
    }


def run_key(key: Any) -> str:
    """The name of a run's folder, which came over the network."""
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key):
        raise ValueError(f"a run's key has up to 64 letters, digits, - and _; got {key!r}"[:200])
    return key


def text(error: Exception) -> str:
    """An error and where it was raised; the last characters, if it is long."""
    return "".join(traceback.format_exception(error))[-TEXT:]
