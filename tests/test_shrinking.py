"""An eta that shrinks with the model: as a dense one with zeros, on the wire, in the server's state, on disk."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedprior as fp
from cases import CONV, IMAGES, close, equal, image_clients, normal
from draws import uniform
from fedprior import Params, Stats, checkpoint, inference, priors, server, structure, tree, wire
from fedprior.codecs import PayloadError, Sparse, schema_of
from fedprior.objective import Objective
from fedprior.priors.parts import part_etas
from fedprior.privacy.layout import kept
from fedprior.rng import generator
from fedprior.shrinking import between

PARAMS = Objective(CONV).params()
ROUNDS = 5
TOLERANCE = {"float64": 0.0, "float32": 2**-24, "int8": 1 / 127, "int4": 1 / 7}  # of the largest value
SERVERS: dict[str, Any] = {
    "exact": server.Exact(),
    "damped": server.Damped(0.7),
    "momentum": server.Momentum(1.0, 0.5),
    "adagrad": server.Adagrad(0.1, 0.3),
    "adam": server.Adam(),
    "yogi": server.Yogi(),
}


def shrinking(step: Any = None, mixture: bool = False, **fields: Any) -> fp.Algorithm:
    """From 60 % of the parameters to 25 % in four rounds."""
    prior: Any = priors.SharedGates(0.25, 0.6, 4, hold=0)
    algorithm = fp.fedsparsemixture(0.1, 0.25) if mixture else fp.fedsparse(0.1, density=0.25)
    prior = priors.SparseMixture(2, prior) if mixture else prior
    return replace(algorithm, prior=prior, server=step or algorithm.server, **fields).bind(CONV, IMAGES)


def drawn(eta: Any, clients: float, seed: int) -> Stats:
    """What some clients might have sent."""
    rng = generator(seed, "sent")
    terms = {"phi": normal(rng, eta.mean), "gain": uniform(rng, eta.gain, 0.1, 0.9)}
    return Stats(terms).weighted(clients)


def drawn_parts(eta: Any, seed: int) -> Stats:
    """Of two components, with as many clients each."""
    parts = [drawn(part, 2.0, seed + k) for k, part in enumerate(part_etas(eta))]
    terms = {f"part{k}_{term}": params for k, t in enumerate(parts) for term, params in t.terms.items()}
    return Stats({**terms, "pi": {"pi": torch.tensor([2.0, 2.0], dtype=torch.float64)}}, 4.0)


def etas(algorithm: fp.Algorithm) -> list[Any]:
    """Those of a few rounds."""
    eta, state = algorithm.start(PARAMS)
    found = [eta]
    for t in range(ROUNDS):
        total = drawn_parts(eta, 9 * t) if hasattr(eta, "share") else drawn(eta, 3.0, t)
        eta, state = algorithm.m_step(eta, total, state)
        found.append(eta)
    return found


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("idle", [False, True])
def test_the_server_does_what_it_would_do_with_zeros(name: str, idle: bool) -> None:
    """The same step on full tensors, in which what was removed stays zero: the same weights and the same state."""
    algorithm, step = shrinking(SERVERS[name]), SERVERS[name]
    prior: Any = algorithm.prior
    eta, state = algorithm.start(PARAMS)
    full, dense = {f"mean/{k}": v for k, v in prior.point(eta).items()}, {}
    dense = step.init(full)
    for t in range(ROUNDS):
        if idle and t == 2:
            after, state = algorithm.idle(eta, state)
        else:
            total = drawn(eta, 3.0, t)
            phi = prior.whole(eta, {k: v / 3 for k, v in total["phi"].items()})
            full, dense = step.step(full, {f"mean/{k}": v for k, v in phi.items()}, dense)
            after, state = algorithm.m_step(eta, total, state)
        eta, cut = after, prior.cut(after)
        full, dense = (masked(cut, params) for params in (full, dense))
        assert close(prior.point(eta), {k.removeprefix("mean/"): v for k, v in full.items()})
        assert close(eta.mean, cut.gather(prior.point(eta)))
        for key, value in dense.items():
            head, name_of = key.rsplit("/", 1)
            assert torch.allclose(state[f"{head}/{name_of}"], cut.gather({name_of: value})[name_of])
        for key in (k for k in state if "gain/" in k):
            assert state[key].shape == eta.gain[key.rsplit("/", 1)[1]].shape
    assert tree.size(eta.mean) <= 0.25 * tree.size(PARAMS) < tree.size(algorithm.start(PARAMS)[0].mean)


def masked(cut: Any, flat: Params) -> Params:
    """Zeros where units are removed."""
    return {
        k: cut.scatter(cut.gather({n: v}) | _nothing(cut, n))[n] for k, v in flat.items() for n in [k.rsplit("/", 1)[1]]
    }


def _nothing(cut: Any, name: str) -> Params:
    """The other tensors, which scatter asks for."""
    return {other: cut.gather({other: v})[other] for other, v in PARAMS.items() if other != name}


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("value_type", TOLERANCE)
def test_a_broadcast_says_how_large_it_is(mixture: bool, value_type: str) -> None:
    """Read by a client that knows the first eta alone; exact values arrive as they are, and gates always do."""
    algorithm = shrinking(mixture=mixture, codec=Sparse(value_type), downlink=None, delta=False)
    every = etas(algorithm)
    lengths = []
    for eta in every:
        payload = wire.encode_eta(algorithm, eta)
        got = wire.decode_eta(algorithm, every[0], payload)
        assert schema_of(tree.flatten(got)) == schema_of(tree.flatten(eta))
        for key, value in tree.flatten(eta).items():
            within = 0.0 if "keep/" in key else TOLERANCE[value_type] * float(value.abs().max())
            assert torch.allclose(tree.flatten(got)[key], value, rtol=0, atol=within)
        lengths.append(len(payload))
    assert lengths[-1] < 0.9 * lengths[0]


def bad_payloads() -> dict[str, bytes]:
    algorithm = shrinking()
    eta = etas(algorithm)[2]
    good = wire.encode_eta(algorithm, eta)
    (length,) = struct.unpack_from("<I", good)
    group = next(iter(eta.keep))

    def with_gates(z: Any) -> bytes:
        index = {k: v for k, v in tree.flatten(eta).items() if k.startswith("keep/")}
        first = algorithm.codec.encode(index | {f"keep/{group}": z(eta.keep[group])}, 0.0)
        return struct.pack("<I", len(first)) + first + good[4 + length :]

    closed = eta.keep | {group: torch.zeros_like(eta.keep[group])}
    cut = between(algorithm.prior.groups, eta.keep, closed)  # type: ignore[attr-defined]
    nothing = eta._replace(mean=cut.gather(eta.mean), keep=closed, gain=eta.gain | {group: eta.gain[group][:0]})
    return {
        "empty": b"",
        "three bytes": good[:3],
        "cut in the index": good[: 4 + length // 2],
        "no weights": good[: 4 + length],
        "a byte less": good[:-1],
        "a byte more": good + b"\0",
        "a longer index": struct.pack("<I", length + 1) + good[4:],
        "a shorter index": struct.pack("<I", length - 1) + good[4:],
        "an endless index": struct.pack("<I", 2**32 - 1) + good[4:],
        "half a gate": with_gates(lambda z: 0.5 * z),
        "a negative gate": with_gates(lambda z: -z),
        "no gate open": wire.encode_eta(algorithm, nothing),
        "other gates": with_gates(torch.ones_like),
    }


@pytest.mark.parametrize("name", bad_payloads())
def test_a_broadcast_that_is_none_is_refused(name: str) -> None:
    algorithm = shrinking()
    with pytest.raises(PayloadError):
        wire.decode_eta(algorithm, algorithm.start(PARAMS)[0], bad_payloads()[name])


@pytest.mark.parametrize("mixture", [False, True])
def test_what_clients_send_has_the_shapes_of_what_they_got(mixture: bool) -> None:
    """No message has room for what was removed; its schema is known to both sides from eta."""
    algorithm = shrinking(mixture=mixture)
    sizes = []
    for eta in etas(algorithm):
        schema = wire.message_schema(algorithm, eta)
        parts = part_etas(eta) if mixture else [eta]
        wanted = sum(tree.size(part.mean) + tree.size(part.gain) for part in parts) + 2 * mixture
        assert sum(torch.Size(shape).numel() for shape, _ in schema.values()) == wanted
        sizes.append(wanted)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.6 * sizes[0]


def test_checkpoints_shrink_and_an_altered_one_is_refused(tmp_path: Path) -> None:
    """With the server step's state; what is on disk at the end is what is left, twice, and vectors of units."""
    clients, model = image_clients(4, 16), fp.models.lenet((6, 8), 16, 4, 16)
    algorithm = fp.fedsparse(0.1, density=0.2, batch_size=8)
    result = fp.run(algorithm, model, clients, rounds=6, out=tmp_path)
    saved = checkpoint.read(tmp_path)
    assert saved is not None
    units = sum(g.units for g in result.algorithm.prior.groups)  # type: ignore[attr-defined]
    left = sum(len(kept) for kept in result.kept.values())
    assert tree.size(saved.eta) == result.parameters_left + units + left + 2
    assert tree.size(saved.server) == tree.size(saved.eta)
    assert equal(saved.eta, tree.flatten(result.eta))
    sized = wire.sized(result.algorithm, result.algorithm.start(Objective(model).params())[0], saved.eta)
    assert schema_of(tree.flatten(sized)) == schema_of(saved.eta)


def test_of_an_eta_that_keeps_zeros_no_mask_covers_what_is_removed() -> None:
    """Secure sums and noise leave out the entries of closed units, which are the zeros of ones behind closed gates."""
    prior = priors.GroupLasso(0.0).bind(CONV, IMAGES)
    eta = prior.init(normal(generator(0, "eta"), PARAMS))
    closed = {g: torch.arange(len(z)) % 2 for g, z in eta.keep.items()}
    eta = prior.project(eta, eta._replace(keep=closed))
    schema = wire.message_schema(fp.Algorithm(prior, inference.Point(0.1)), eta)
    alive = structure.apply(structure.alive(prior.groups, closed, PARAMS), tree.map(torch.ones_like, PARAMS))
    for key, places in kept(prior, eta, schema).items():
        assert places.tolist() == (alive[key.split("/", 1)[1]].flatten() > 0).tolist()
    assert sum(int(z.sum()) for z in alive.values()) < tree.size(PARAMS)
