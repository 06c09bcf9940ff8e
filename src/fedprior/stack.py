"""A round's work for many clients at once: what `RoundWork.client` and `receive` do, for a stack of them.

Payloads of a plain codec (every value as it is) all have one length, and decode to what was encoded: one of a stack is
encoded, and measured, for all. With any other codec, with deltas, and where a value is not finite, every client's
payload is written and read. A stack's seconds are shared out equally among its clients.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch

from fedprior import posteriors, tree, wire
from fedprior.codecs import Dense, schema_of
from fedprior.core import Client, Eta, Examples, Gathered, Params, Population, Stats
from fedprior.records import ClientRecord, Status
from fedprior.rng import generator
from fedprior.round import RoundWork, Upload, check_examples


def why_not(work: RoundWork, first: Client) -> str:
    """Why clients cannot be stacked, in words; empty if they can."""
    algorithm, inference = work.algorithm, work.algorithm.inference
    if not hasattr(inference, "e_steps"):
        return f"the inference {type(inference).__name__} does one client at a time"
    if algorithm.layered:
        return "secure=..., privacy=... and robust=... take uploads one by one"
    if algorithm.samples:
        return f"{type(algorithm.prior).__name__} sends each client an eta of its own"
    if getattr(algorithm.codec, "value_type", "float32") not in ("float32", "float64"):
        return "the codec rounds values: another last bit would become another step"
    if algorithm.feedback or hasattr(algorithm.prior, "kept"):
        return "clients keep a state of their own"
    example = first.train.take(torch.tensor([0])).to(work.device)
    if reason := cast(Any, inference).why_not_stacked(work.objective, algorithm.prior, example.x, example.y):
        return reason
    try:
        _messages(work, work.like, {k: v[None] for k, v in algorithm.prior.point(work.like).items()})
    except RuntimeError as error:
        return f"the statistics of {type(algorithm.prior).__name__} cannot be stacked: {str(error).splitlines()[0]}"
    return ""


def uploads(work: RoundWork, indices: Sequence[int]) -> tuple[list[Upload], Stats | None]:
    """The sum of what the clients send, and its records; or, in the order of `indices`, uploads to be received."""
    data, down = _gathered(work.population, indices), len(work.down)
    clients = list(zip(data.indices, data.names, data.sizes, strict=True))
    for _, name, examples in clients:
        check_examples(name, examples)
    status: list[Status] = [work.availability.status(work.seed, work.number, i, n) for i, _, n in clients]
    rows = [row for row, s in enumerate(status) if s == "ok"]
    payloads, total, seconds, wired = _answers(work, data.part(rows)) if rows else ([], None, 0.0, 0.0)
    sent = dict(zip(rows, payloads, strict=True))
    if total is not None:
        up = len(payloads[0])
        for row, ((index, name, examples), s) in enumerate(zip(clients, status, strict=True)):
            took = (up, seconds, "", wired) if row in sent else (0, 0.0, "", 0.0)
            work.records.append(ClientRecord(index, name, s, examples, down, *took))
        return [], total
    return [
        Upload(*client, s, down, sent[row], {}, seconds, wired) if row in sent else Upload(*client, s, down)
        for row, (client, s) in enumerate(zip(clients, status, strict=True))
    ], None


def _gathered(population: Population, indices: Sequence[int]) -> Gathered:
    """Where several clients' training examples are."""
    gather = getattr(population, "gather", None)
    if gather:
        return gather(indices)
    clients = [population[i] for i in indices]
    x, y = (torch.cat([getattr(c.train, field) for c in clients]) for field in ("x", "y"))
    sizes = [len(c.train) for c in clients]
    return Gathered([c.index for c in clients], [c.name for c in clients], Examples(x, y), torch.arange(len(x)), sizes)


def _answers(work: RoundWork, data: Gathered) -> tuple[list[bytes], Stats | None, float, float]:
    """The clients' payloads, the sum if it needs no decoding, and a client's seconds of training and of the wire."""
    algorithm, began, eta = work.algorithm, time.perf_counter(), work.common
    rngs = [generator(work.seed, work.number, i, "e_step") for i in data.indices]
    started, stackable = time.perf_counter(), cast(Any, algorithm.inference)
    q = stackable.e_steps(work.objective, algorithm.prior, eta, data, rngs)
    seconds = time.perf_counter() - started
    weights = [algorithm.weight(n) for n in data.sizes]
    stack = _messages(work, eta, q.phi)
    first, *others = range(len(weights))

    def payload(client: int) -> bytes:
        message = {k: v[client] * weights[client] for k, v in stack.items()}
        return algorithm.codec.encode(message, weights[client])

    total, payloads = _sum(work, stack, weights), [payload(first)] * len(weights)
    if total is None:
        payloads[1:] = map(payload, others)
    wired = time.perf_counter() - began - seconds
    return payloads, total, seconds / len(weights), wired / len(weights)


def _messages(work: RoundWork, eta: Eta, phi: Params) -> Params:
    """The clients' messages, before their weights and the codec: (clients, ...)."""
    algorithm = work.algorithm

    def message(phi: Params) -> Params:
        stats = algorithm.message(eta, posteriors.Point(phi))
        return wire.difference(algorithm, eta, stats)[0] if algorithm.delta else wire.flat(stats)

    return torch.func.vmap(message)(phi)


def _sum(work: RoundWork, stack: Params, weights: Sequence[float]) -> Stats | None:
    """The sum of what the payloads would decode to; None if each has to be decoded."""
    algorithm, codec = work.algorithm, work.algorithm.codec
    if not (isinstance(codec, Dense) and codec.plain) or algorithm.delta or hasattr(algorithm.prior, "accept"):
        return None
    if schema_of({k: v[0] for k, v in stack.items()}) != work.schema:
        return None
    carried = getattr(torch, codec.value_type)
    by_client = torch.tensor(weights, dtype=carried, device=work.device)
    total = {k: torch.tensordot(by_client, v.to(carried), 1).to(v.dtype) for k, v in stack.items()}
    if not tree.finite(total.values()):
        return None
    return wire.unflat(total, sum(weights))
