"""What travels down: one payload for all, or one for each client if the prior draws an eta for each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import fedprior as fp
from cases import classification_clients, equal
from fedprior import Availability, inference, priors, tree
from fedprior.codecs import Sparse
from fedprior.rng import generator
from stateful import Watched

CLIENTS, MODEL = classification_clients((6, 9, 4, 7)), fp.models.mlp(4, (5,), 3)


class Thinned(priors.Gaussian):
    """Every client receives some rows of the weights; payloads differ in length."""

    def sample(self, eta, rng):
        rows = {k: (torch.rand(len(v), generator=rng) < 0.5).to(v) for k, v in eta.mean.items()}
        return self.Eta({k: v * rows[k].view(-1, *[1] * (v.ndim - 1)) for k, v in eta.mean.items()})


@dataclass(frozen=True)
class Counted:
    """A codec that notes the messages that go down, and those that come out of it."""

    codec: Sparse
    encoded: list = field(default_factory=list, repr=False)
    decoded: list = field(default_factory=list, repr=False)

    def encode(self, message, clients: float) -> bytes:
        payload = self.codec.encode(message, clients)
        if clients == 0:
            self.encoded.append(payload)
        return payload

    def decode(self, payload: bytes, schema):
        message, clients = self.codec.decode(payload, schema)
        if clients == 0:
            self.decoded.append(payload)
        return message, clients


def run(prior, rounds: int = 1, **fields) -> tuple[fp.Result, Counted, Watched]:
    codec, e_step = Counted(Sparse("bfloat16")), Watched(inference.Point(0.1))
    return (
        fp.run(fp.Algorithm(prior, e_step, codec=codec), MODEL, CLIENTS, rounds=rounds, engine="sequential", **fields),
        codec,
        e_step,
    )


def test_one_payload_for_all_is_encoded_and_decoded_once_a_round() -> None:
    result, codec, _ = run(priors.Gaussian(), rounds=3)
    assert len(codec.encoded) == len(codec.decoded) == 3
    for record, payload in zip(result.history, codec.encoded, strict=True):
        assert [c.bytes_down for c in record.clients] == [len(payload)] * len(CLIENTS)


def test_a_client_of_its_own_payload_trains_from_what_it_decodes() -> None:
    """Lengths are those of the payloads, also for clients that never answer; bfloat16 shows that eta was decoded."""
    fleet = Availability(dropout=0.4)
    result, codec, e_step = run(Thinned(), availability=fleet)
    eta = Thinned.Eta({k: p.detach() for k, p in MODEL.named_parameters()})
    lengths, seen = [], dict(e_step.seen)
    for client, record in zip(CLIENTS, result.history[0].clients, strict=True):
        sent = tree.flatten(Thinned().sample(eta, generator(0, 1, client.index, "downlink")))
        payload = Sparse("bfloat16").encode(sent, 0.0)
        assert record.bytes_down == len(payload) and payload in codec.encoded
        lengths.append(len(payload))
        if record.status == "ok":
            received, _ = Sparse("bfloat16").decode(payload, {k: (tuple(v.shape), v.dtype) for k, v in sent.items()})
            assert equal(tree.flatten(seen[client.index]), received) and not equal(received, sent)
    assert len(set(lengths)) > 1 and len(seen) < len(CLIENTS) == len(codec.encoded)
    assert len(codec.decoded) == len(seen)
    assert result.bytes_down == sum(lengths)
