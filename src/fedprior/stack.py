"""Both sides of the wire for many clients at once: what `RoundWork.client` and `receive` do, for a stack of them.

A stack's seconds are shared out equally among its clients.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from fedprior import posteriors, wire
from fedprior.algorithm import Algorithm
from fedprior.codecs import Dense, PayloadError
from fedprior.core import Client, Eta, Examples, Gathered, Params, Population, Stats
from fedprior.rng import generator
from fedprior.round import RoundWork, Upload


def why_not(work: RoundWork, first: Client) -> str:
    """Why clients cannot be stacked, in words; empty if they can."""
    algorithm = work.algorithm
    if not hasattr(algorithm.inference, "e_steps"):
        return f"the inference {type(algorithm.inference).__name__} does one client at a time"
    if algorithm.layered:
        return "secure=..., privacy=... and robust=... take uploads one by one"
    if algorithm.samples:
        return f"{type(algorithm.prior).__name__} sends each client an eta of its own"
    if algorithm.feedback or hasattr(algorithm.prior, "kept"):
        return "clients keep a state of their own"
    example = first.train.take(torch.tensor([0])).to(work.device)
    if reason := algorithm.inference.why_not_stacked(work.objective, algorithm.prior, example.x, example.y):
        return reason
    try:
        _messages(algorithm, work.like, {k: v[None] for k, v in algorithm.prior.point(work.like).items()})
    except RuntimeError as error:
        return f"the statistics of {type(algorithm.prior).__name__} cannot be stacked: {str(error).splitlines()[0]}"
    return ""


def gathered(population: Population, indices: Sequence[int]) -> Gathered:
    """Several clients' training examples."""
    gather = getattr(population, "gather", None)
    if gather:
        return gather(indices)
    clients = [population[i] for i in indices]
    x, y = (torch.cat([getattr(c.train, field) for c in clients]) for field in ("x", "y"))
    return Gathered(
        [c.index for c in clients], [c.name for c in clients], [len(c.train) for c in clients], Examples(x, y)
    )


def uploads(work: RoundWork, indices: Sequence[int]) -> list[Upload]:
    """What the clients send, in the order of `indices`."""
    data = gathered(work.population, indices)
    if 0 in data.sizes:
        name = data.names[list(data.sizes).index(0)]
        raise ValueError(f"client {name!r} has no training examples: leave it out of the population")
    down = len(work.down)
    status = [
        work.availability.status(work.seed, work.number, i, n) for i, n in zip(data.indices, data.sizes, strict=True)
    ]
    sent = dict(_answers(work, _part(data, [r for r, s in enumerate(status) if s == "ok"])))
    rows = zip(data.indices, data.names, data.sizes, status, strict=True)
    return [sent.get(i) or Upload(i, name, size, s, down) for i, name, size, s in rows]


def _part(data: Gathered, rows: Sequence[int]) -> Gathered:
    """The clients at `rows`."""
    if len(rows) == len(data.sizes):
        return data
    starts = data.starts
    index = torch.cat([torch.arange(0), *(torch.arange(starts[r], starts[r] + data.sizes[r]) for r in rows)])
    names, sizes = ([values[r] for r in rows] for values in (data.names, data.sizes))
    return Gathered([data.indices[r] for r in rows], names, sizes, data.examples.take(index))


def _answers(work: RoundWork, data: Gathered) -> list[tuple[int, Upload]]:
    """The uploads of clients that answer, by index."""
    if not data.sizes:
        return []
    began, algorithm, eta = time.perf_counter(), work.algorithm, work.common
    data = Gathered(data.indices, data.names, data.sizes, data.examples.to(work.device))
    rngs = [generator(work.seed, work.number, i, "e_step") for i in data.indices]
    started = time.perf_counter()
    q = algorithm.inference.e_steps(work.objective, algorithm.prior, eta, data, rngs)  # pyright: ignore[reportAttributeAccessIssue]
    seconds = time.perf_counter() - started
    weights = [float(n) if algorithm.weighting == "examples" else 1.0 for n in data.sizes]
    payloads = _encoded(algorithm, eta, q.phi, weights)
    wired = (time.perf_counter() - began - seconds) / len(payloads)
    each, down = seconds / len(payloads), len(work.down)
    rows = zip(data.indices, data.names, data.sizes, payloads, strict=True)
    return [(i, Upload(i, name, n, "ok", down, payload, {}, each, wired)) for i, name, n, payload in rows]


def _encoded(algorithm: Algorithm, eta: Eta, phi: Params, weights: Sequence[float]) -> list[bytes]:
    """One payload a client: wire.encode, for a stack."""
    stack = _messages(algorithm, eta, phi)
    by_client = torch.tensor(weights, dtype=torch.float64)
    stack = {k: v * by_client.to(v).reshape(-1, *[1] * (v.ndim - 1)) for k, v in stack.items()}
    if isinstance(algorithm.codec, Dense) and algorithm.codec.plain:
        return algorithm.codec.encode_rows(stack, weights)
    return [algorithm.codec.encode({k: v[c] for k, v in stack.items()}, w) for c, w in enumerate(weights)]


def _messages(algorithm: Algorithm, eta: Eta, phi: Params) -> Params:
    """The clients' messages, before their weights."""

    def message(phi: Params) -> Params:
        stats = algorithm.message(eta, posteriors.Point(phi))
        own = wire.flat(stats)
        known = wire.flat(algorithm.reference(eta, stats)) if algorithm.delta else {}
        return own | {k: own[k] - r for k, r in known.items()}

    return torch.func.vmap(message)(phi)


def received(work: RoundWork, uploads: Sequence[Upload]) -> Stats | None:
    """The sum of what was accepted; a stack with something wrong in it is received one by one."""
    algorithm, began = work.algorithm, time.perf_counter()
    arrived = [u for u in uploads if u.status == "ok"]
    codec = algorithm.codec
    alike = isinstance(codec, Dense) and codec.plain and not algorithm.delta and not hasattr(algorithm.prior, "accept")
    if not (alike and arrived):
        return _one_by_one(work, uploads)
    try:
        message, counts = codec.decode_rows([u.payload for u in arrived], work.up_schema)
    except PayloadError:
        return _one_by_one(work, uploads)
    if counts != [float(u.examples) if algorithm.weighting == "examples" else 1.0 for u in arrived]:
        return _one_by_one(work, uploads)
    total = {k: v.to(work.device).sum(0) for k, v in message.items()}
    each = (time.perf_counter() - began) / len(uploads)
    work.records += [u.record(u.status, "", each) for u in uploads]
    return wire.unflat(total, sum(counts))


def _one_by_one(work: RoundWork, uploads: Sequence[Upload]) -> Stats | None:
    accepted = [stats for u in uploads if (stats := work.receive(u)) is not None]
    return sum(accepted[1:], accepted[0]) if accepted else None
