"""Rounded values in runs: the accuracy of float32 for a quarter of the bytes, and the same bits after a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import fedprior as fp
from cases import classification_clients, equal, image_clients, pooled, without_seconds
from fedprior import tree
from fedprior.codecs import Dense, Sparse


def test_fedavg_with_int8_learns_as_float32_does_for_a_quarter_of_the_bytes() -> None:
    train, test = fp.data.load("digits")
    clients = fp.data.dirichlet(train, clients=5, alpha=10.0, seed=0)

    def run(codec) -> fp.Result:
        algorithm = replace(fp.fedavg(lr=0.1, epochs=2), codec=codec)
        return fp.run(algorithm, fp.models.mlp(64, (64,), 10), clients, rounds=6, test=test, seed=0, evaluate_every=6)

    exact, rounded = run(Dense()), run(Dense("int8"))
    assert exact.accuracy > 0.85
    assert abs(rounded.accuracy - exact.accuracy) <= 0.02
    assert rounded.bytes_up < 0.3 * exact.bytes_up and rounded.bytes_down < 0.3 * exact.bytes_down
    assert not equal(rounded.params, exact.params)


@pytest.mark.parametrize("codec", [Sparse("int8"), Sparse("int4", "zlib"), Sparse("bfloat16", "zstd")], ids=repr)
def test_fedsparse_with_rounded_values_is_resumed_bit_for_bit(codec, tmp_path: Path) -> None:
    clients = classification_clients((6, 5, 9, 4, 7))
    algorithm = replace(fp.fedsparse(0.1, lambda_0=0.3, gate_lr=0.4), codec=codec)

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
