"""Shorter messages in runs: about the accuracy of float32 for a fraction of the bytes, and the same bits on resume."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedprior as fp
from cases import classification_clients, equal, image_clients, pooled, without_seconds
from fedprior import tree
from fedprior.codecs import Sparse

SHORTER = {  # algorithm, largest loss of accuracy, largest fractions of the bytes up and down
    "int8": (fp.fedavg(0.1, 2, value_type="int8"), 0.02, 0.3, 0.3),
    "int4": (fp.fedavg(0.1, 2, value_type="int4", entropy="zlib"), 0.03, 0.14, 0.3),
    "topk": (fp.topk(0.1, 0.1, 2), 0.05, 0.14, 1.0),
    "topk-int8": (fp.topk(0.1, 0.1, 2, value_type="int8"), 0.05, 0.07, 1.0),
}


@functools.cache
def digits(algorithm: fp.Algorithm) -> fp.Result:
    train, test = fp.data.load("digits")
    clients = fp.data.dirichlet(train, clients=5, alpha=10.0, seed=0)
    return fp.run(algorithm, fp.models.mlp(64, (64,), 10), clients, rounds=6, test=test, seed=0, evaluate_every=6)


@pytest.mark.parametrize("name", SHORTER)
def test_fedavg_with_shorter_messages_learns_as_float32_does(name: str) -> None:
    """int8 for a quarter of the bytes, int4 for an eighth, a tenth of the entries for little more than a tenth."""
    algorithm, loss, up, down = SHORTER[name]
    exact, shorter = digits(fp.fedavg(0.1, 2)), digits(algorithm)
    assert exact.accuracy > 0.85 and shorter.accuracy >= exact.accuracy - loss
    assert shorter.bytes_up < up * exact.bytes_up and shorter.bytes_down <= down * exact.bytes_down
    assert not equal(shorter.params, exact.params)
    assert not any(c.status == "rejected" for r in shorter.history for c in r.clients)


def test_feedback_makes_up_for_what_top_k_leaves_out() -> None:
    """The same bytes, but for the entropy coder, and more learned."""
    with_it, without = (digits(replace(fp.topk(0.1, 0.03, 2), feedback=on)) for on in (True, False))
    assert with_it.accuracy > without.accuracy + 0.03
    assert with_it.bytes_up == pytest.approx(without.bytes_up, rel=0.05)


def test_fedsparse_with_deltas_is_no_longer_and_nearer_to_float32() -> None:
    """Closed gates cost nothing with deltas either; four bits of a difference tell more than four bits of a weight."""
    clients = image_clients(3, 40)

    def run(codec, delta: bool) -> fp.Result:
        algorithm = replace(
            fp.fedsparse(0.1, lambda_0=0.03, gate_lr=0.3, batch_size=8), codec=codec, delta=delta, downlink=Sparse()
        )
        return fp.run(algorithm, fp.models.lenet((6, 8), 16, 4, 16), clients, rounds=1)

    exact, plain, short = run(Sparse(), False), run(Sparse("int4"), False), run(Sparse("int4"), True)

    def distance(result: fp.Result) -> float:
        d = tree.map(torch.sub, result.eta.mean, exact.eta.mean)
        return float(tree.dot(d, d)) ** 0.5

    assert short.bytes_up <= plain.bytes_up < 0.4 * exact.bytes_up
    assert 0 < distance(short) < 0.5 * distance(plain)


@pytest.mark.parametrize("codec", [Sparse("int8"), Sparse("int4", "zlib"), Sparse("bfloat16", "zstd")], ids=repr)
def test_fedsparse_with_rounded_values_is_resumed_bit_for_bit(codec, tmp_path: Path) -> None:
    clients = classification_clients((6, 5, 9, 4, 7))
    algorithm = replace(fp.fedsparse(0.1, lambda_0=0.3, gate_lr=0.4), codec=codec, delta=True)

    def run(rounds: int = 6, **fields) -> fp.Result:
        return fp.run(algorithm, fp.models.mlp(4, (6,), 3), clients, rounds=rounds, cohort=3, **fields)

    whole = run()
    run(3, out=tmp_path)
    resumed = run(out=tmp_path, resume=True)
    assert equal(tree.flatten(resumed.eta), tree.flatten(whole.eta))
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert not any(c.status == "rejected" for r in whole.history for c in r.clients)


def test_fedsparse_with_int8_removes_units_and_learns() -> None:
    """Removed units stay removed, and what is left is sent in less than half of the bytes (small rows: steps count)."""
    clients = image_clients(3, 40)

    def run(codec) -> fp.Result:
        algorithm = replace(fp.fedsparse(lr=0.1, lambda_0=0.03, gate_lr=0.3, batch_size=8), codec=codec)
        model = fp.models.lenet((6, 8), 16, 4, 16)
        return fp.run(algorithm, model, clients, rounds=10, test=pooled(clients))

    exact, rounded = run(Sparse()), run(Sparse("int8"))
    left = [r.parameters_left for r in rounded.history]
    assert left == sorted(left, reverse=True) and left[-1] < 0.9 * rounded.parameters
    assert rounded.accuracy > exact.accuracy - 0.05
    assert rounded.bytes_up < 0.5 * exact.bytes_up
