"""Whatever a client says, in all of its statistics or in one of them alone, it moves a private sum by at most C.

And no entry that a client can move is published without noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import pytest
import torch

import fedprior as fp
from cases import classification_clients
from fedprior import wire
from fedprior.codecs import schema_of
from fedprior.layer import Setting
from fedprior.objective import Objective
from fedprior.privacy import Privacy, clipping
from fedprior.records import ClientRecord
from fedprior.rng import generator

COHORT, MOST = 9, 0.5
CLIENTS = classification_clients((8, 9, 14, 7, 6, 11, 20, 5, 9))
MODEL = fp.models.mlp(4, (40,), 3)
OTHER = {"fednsl", "fedbn", "local"}  # rules and running means, which ask for another model; nothing that is sent
MAKES: dict[str, Callable[..., fp.Algorithm]] = {k: v for k, v in fp.ALGORITHMS.items() if k not in OTHER}
MAKES["gated"] = lambda lr: fp.fedsparse(lr, lambda_0=0.3, gate_lr=0.4)


def private(make: Callable[..., fp.Algorithm], model: Any = MODEL, noise: float = 0.0) -> fp.Algorithm | None:
    """The algorithm with a clip of MOST; None if its statistics are not summed."""
    privacy = Privacy(noise_multiplier=noise, delta=0.01, clip=MOST).planned(3, COHORT, COHORT)
    plain = replace(make(lr=0.1), weighting="uniform")
    if plain.individual:
        with pytest.raises(ValueError, match="one by one"):
            replace(plain, privacy=privacy)
        return None
    bound: Any = replace(plain, privacy=privacy).bind(model, torch.zeros(1, 4))
    return replace(bound, prior=bound.prior.scheduled(3)) if hasattr(bound.prior, "scheduled") else bound


@pytest.mark.parametrize("name", MAKES)
def test_a_client_moves_the_sum_by_at_most_c(name: str) -> None:
    algorithm = private(MAKES[name])
    if algorithm is None:
        return
    eta, server = algorithm.start({k: v.detach() for k, v in MODEL.named_parameters()})
    known = wire.flat(algorithm.message(eta, algorithm.inference.start(algorithm.prior, eta)))
    layer = Setting(algorithm, schema_of(known), COHORT, 0).layer(1, eta, server, dict.fromkeys(range(COHORT), ""))
    terms = {key.split("/")[0] for key in known}
    for part in [terms, *({term} for term in terms)]:
        said = {
            k: v + 100 * torch.randn(v.shape, generator=generator(0, k)) if k.split("/")[0] in part else v
            for k, v in known.items()
        }
        heard = wire.flat(layer.receive(eta, wire.unflat(said, 1.0), ""))
        moved = clipping.norm({k: v for k, v in heard.items() if not k.startswith("privacy/")}, {})
        assert moved == pytest.approx(MOST, rel=1e-5), part


@pytest.mark.parametrize("name", [*MAKES, "fednsl"])
def test_what_a_client_can_move_is_published_with_noise(name: str) -> None:
    """At the first eta, and after two rounds, by when units are removed: noise wherever somebody said something."""
    objective = Objective(fp.models.rules(4, 3) if name == "fednsl" else MODEL)
    algorithm = private({**MAKES, "fednsl": fp.fednsl}[name], objective.model, noise=1.0)
    if algorithm is None:
        return
    eta, server = algorithm.start(objective.params())
    for number in (1, 2, 3):
        answers = [algorithm.e_step(objective, eta, c, None, None, generator(number, c.index))[0] for c in CLIENTS]
        messages = [algorithm.message(eta, q) for q in answers]
        schema = schema_of(wire.flat(messages[0]))
        layer = Setting(algorithm, schema, COHORT, 0).layer(number, eta, server, {})
        heard = [layer.receive(eta, stats, "") for stats in messages]
        total = layer.finish(eta, reduce(add, heard), [record(c) for c in CLIENTS]).total
        published, _ = wire.difference(algorithm, eta, total)
        for key in schema:
            said = torch.stack([wire.flat(stats)[key].double() for stats in heard])
            noise = published[key].double() - said.sum(0)
            assert bool((noise.abs() > 1e-7)[(said != 0).any(0)].all()), (number, key)
            assert not published[key][noise == 0].any(), (number, key)
        eta, server = algorithm.m_step(eta, reduce(add, messages), server)


def record(client: fp.Client) -> ClientRecord:
    """Of a client that answered."""
    return ClientRecord(client.index, client.name, "ok", len(client.train), 0, 0, 0.0)


def test_what_sends_nothing_has_nothing_to_hide() -> None:
    algorithm = replace(fp.local(0.1), weighting="uniform", privacy=Privacy(noise_multiplier=1.0, delta=0.01))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="local sends no statistics"):
        warnings.simplefilter("ignore")
        fp.run(algorithm, MODEL, classification_clients((5, 5, 5)), rounds=1)
