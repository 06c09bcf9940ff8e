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
from fedprior.slim import Cut

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
    prior: Any = priors.SharedGates(0.25, 0.6, 4, 3.0, hold=0)
    algorithm = fp.fedsparsemixture(0.1, 0.25) if mixture else fp.fedsparse(0.1, density=0.25)
    prior = priors.SparseMixture(2, prior) if mixture else prior
    return replace(algorithm, prior=prior, server=step or algorithm.server, **fields).bind(CONV, IMAGES)


def gates(algorithm: fp.Algorithm) -> priors.SharedGates:
    """The prior of each component, or of the one that there is."""
    prior: Any = algorithm.prior
    return getattr(prior, "prior", prior)


def parts(eta: Any) -> dict[str, Any]:
    """How the names of its fields begin -> the eta of each component, or of the one that there is."""
    return {f"part{k}_": part for k, part in enumerate(part_etas(eta))} if hasattr(eta, "share") else {"": eta}


def drawn(eta: Any, seed: int) -> Stats:
    """What two clients of each component might have sent."""
    terms = {}
    for prefix, part in parts(eta).items():
        rng = generator(seed, f"sent{prefix}")
        terms[f"{prefix}phi"] = normal(rng, part.mean)
        terms[f"{prefix}gain"] = uniform(rng, part.gain, 0.1, 0.9)
    if hasattr(eta, "share"):
        terms["pi"] = tree.map(torch.ones_like, eta.share)
    double = Stats(terms).weighted(2.0)
    return replace(double, clients=2.0 * len(parts(eta)))


def etas(algorithm: fp.Algorithm) -> list[Any]:
    """Those of a few rounds."""
    eta, state = algorithm.start(PARAMS)
    found = [eta]
    for t in range(ROUNDS):
        eta, state = algorithm.m_step(eta, drawn(eta, t), state)
        found.append(eta)
    return found


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("idle", [False, True])
def test_the_server_does_what_it_would_do_with_zeros(name: str, mixture: bool, idle: bool) -> None:
    """The same step on full tensors, in which what was removed stays zero: the same weights and the same state."""
    algorithm, step = shrinking(SERVERS[name], mixture), SERVERS[name]
    prior = gates(algorithm)
    eta, state = algorithm.start(PARAMS)
    first = least(eta)
    full = filled(prior, eta, {prefix: part.mean for prefix, part in parts(eta).items()})
    dense = step.init(full)
    for t in range(ROUNDS):
        if idle and t == 2:
            eta, state = algorithm.idle(eta, state)
        else:
            total = drawn(eta, t)
            phi = {prefix: {k: v / 2 for k, v in total[f"{prefix}phi"].items()} for prefix in parts(eta)}
            full, dense = step.step(full, filled(prior, eta, phi), dense)
            eta, state = algorithm.m_step(eta, total, state)
        full, dense = (closed(prior, eta, flat) for flat in (full, dense))
        assert close(filled(prior, eta, {prefix: part.mean for prefix, part in parts(eta).items()}), full)
        want = {key: cut.gather({n: v})[n] for key, v in dense.items() for cut, n in [of(prior, eta, key)]}
        assert close({key: state[key] for key in want}, want)
        flat = tree.flatten(eta)
        assert all(v.shape == flat[k if k in flat else k.split("/", 1)[1]].shape for k, v in state.items())
    assert all(tree.size(part.mean) <= 0.25 * tree.size(PARAMS) < first for part in parts(eta).values())


def least(eta: Any) -> int:
    return min(tree.size(part.mean) for part in parts(eta).values())


def of(prior: priors.SharedGates, eta: Any, key: str) -> tuple[Cut, str]:
    """What is left of the component that an entry of the server's state is of, and the name of its parameter."""
    head, _, name = key.rpartition("/")
    (part,) = (part for prefix, part in parts(eta).items() if prefix in head)
    return prior.cut(part), name


def filled(prior: priors.SharedGates, eta: Any, params: dict[str, Params]) -> Params:
    """Each component's parameters as those of the full model, named as in a flat eta."""
    made = {prefix: prior.whole(part, params[prefix]) for prefix, part in parts(eta).items()}
    return {f"{prefix}mean/{k}": v for prefix, full in made.items() for k, v in full.items()}


def closed(prior: priors.SharedGates, eta: Any, flat: Params) -> Params:
    """Zeros where units are removed."""
    out = {}
    for key, value in flat.items():
        cut, name = of(prior, eta, key)
        ones = cut.all_units({g: torch.ones(len(k), dtype=value.dtype) for g, k in cut.kept.items()})
        out[key] = value * structure.alive(prior.groups, ones, PARAMS).get(name, 1)
    return out


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
        "a byte after the index": struct.pack("<I", length + 1) + good[4 : 4 + length] + b"\0" + good[4 + length :],
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
        wanted = sum(tree.size(part.mean) + tree.size(part.gain) for part in parts(eta).values()) + 2 * mixture
        assert sum(torch.Size(shape).numel() for shape, _ in schema.values()) == wanted
        sizes.append(wanted)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.6 * sizes[0]


@pytest.mark.parametrize("share", [(0.3, 0.7), (0.7, 0.3), None])
def test_what_is_deployed_is_the_model_with_most_clients(share: tuple[float, float] | None) -> None:
    """What the full model computes with the zeros of `point`."""
    algorithm, objective = shrinking(mixture=share is not None), Objective(CONV)
    eta, x = etas(algorithm)[-1], normal(generator(0, "x"), {"x": IMAGES})["x"]
    eta = eta if share is None else eta._replace(share={"pi": torch.tensor(share)})
    part = list(parts(eta).values())[share == (0.3, 0.7)]
    deployed, params = algorithm.deploy(eta, objective)
    assert equal(params, part.mean) and deployed.made_by == gates(algorithm).cut(part)
    want = objective.outputs(algorithm.prior.point(eta), x)
    assert torch.allclose(deployed.outputs(params, x), want) and bool(want.any())


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
