"""FedSparse end to end: units go, and with them bytes in both directions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fedprior as fp
from cases import everywhere, image_clients, pooled
from fedprior import structure, tree
from fedprior.codecs import Sparse, schema_of
from fedprior.codecs.frame import HEADER_BYTES

CLIENTS, ROUNDS = 3, 12


def run(lambda_0: float, rounds: int = ROUNDS, **fields) -> fp.Result:
    clients = image_clients(CLIENTS, 40)
    algorithm = fp.fedsparse(lr=0.1, lambda_0=lambda_0, gate_lr=0.3, batch_size=8)
    model = fp.models.lenet((6, 8), 16, 4, 16)
    return fp.run(algorithm, model, clients, rounds=rounds, test=pooled(clients), **fields)


@pytest.fixture(scope="module")
def results() -> dict[float, fp.Result]:
    return {price: run(price) for price in (0.0, 0.03, 0.1)}


def test_a_higher_price_leaves_fewer_parameters(results) -> None:
    left = [r.parameters_left for r in results.values()]
    assert left == sorted(left, reverse=True) and len(set(left)) == 3
    assert results[0.0].parameters_left > 0.9 * results[0.0].parameters
    assert results[0.1].parameters_left < 0.3 * results[0.1].parameters
    bytes_up = [r.bytes_up for r in results.values()]
    assert bytes_up == sorted(bytes_up, reverse=True)


def test_bytes_fall_in_both_directions_as_units_go(results) -> None:
    history = results[0.1].history
    left = [r.parameters_left for r in history]
    assert left == sorted(left, reverse=True) and left[-1] < left[0]
    slack = CLIENTS * 4 * (6 + 8 + 16)  # where all theta of a group are equal, as at their clamp, one of them is sent
    assert all(b.bytes_down <= a.bytes_down + slack for a, b in itertools.pairwise(history))
    fell = [i for i in range(1, ROUNDS - 1) if left[i] < left[i - 1]]
    assert fell and all(history[i + 1].bytes_down < history[i].bytes_down for i in fell)
    assert history[-1].bytes_down < 0.5 * history[0].bytes_down
    assert history[-1].bytes_up < 0.5 * history[0].bytes_up
    dense = fp.run(fp.fedavg(), fp.models.lenet((6, 8), 16, 4, 16), image_clients(CLIENTS, 40), rounds=1)
    assert history[-1].bytes_down < 0.5 * dense.bytes_down and history[-1].bytes_up < 0.5 * dense.bytes_up


def test_the_sparse_model_still_learns(results) -> None:
    """Four bright corners are easy: far above the 0.25 of guessing."""
    assert results[0.03].accuracy > 0.8


def bits(count: int) -> int:
    return math.ceil(count / 8)


def down_length(widths: tuple[int, int, int], alive: tuple[int, int, int]) -> int:
    """Bytes of eta for a lenet of these widths, 4 classes, images of 16 x 16 (one position a filter at the end)."""
    (c1, c2, h), (a1, a2, a3) = widths, alive
    weights = [(c1, 1, a1, 25), (c2, c1, a2, a1 * 25), (h, c2, a3, a2), (4, h, 4, a3)]
    total = HEADER_BYTES
    for rows, columns, kept_rows, kept in weights:
        total += bits(rows) + bits(columns) + 1 + 4 * kept_rows * kept
    for units, kept in ((c1, a1), (c2, a2), (h, a3), (4, 4)):
        total += bits(units) + 1 + 4 * kept
    for units, kept in ((c1, a1), (c2, a2), (h, a3)):
        total += bits(units) + 1 + 4 * kept
    return total


def test_a_dead_unit_is_not_on_the_wire(results) -> None:
    """eta's payload has the length of a model without the removed units, plus one bit a row and column."""
    result = results[0.1]
    prior, eta = result.algorithm.prior, result.eta
    alive = tuple(int((eta.keep[g.name] > 0).sum()) for g in sorted(prior.groups, key=lambda g: int(g.name)))
    assert any(a < w for a, w in zip(alive, (6, 8, 16), strict=True))
    # values that differ: a tensor whose kept values are all equal is sent as one of them
    flat = {k: torch.where(v != 0, 1 + torch.arange(v.numel()).view_as(v), 0.0) for k, v in tree.flatten(eta).items()}
    single = sum(4 * (int((v != 0).sum()) - 1) for v in flat.values() if int((v != 0).sum()) == 1)
    assert single == 0
    payload = Sparse().encode(flat, 0.0)
    assert len(payload) == down_length((6, 8, 16), alive)
    message, _ = Sparse().decode(payload, schema_of(flat))
    assert all(torch.equal(message[k], v) for k, v in flat.items())
    small = fp.models.lenet((alive[0], alive[1]), alive[2], 4, 16)
    assert sum(p.numel() for p in small.parameters()) == result.parameters_left


def test_removed_units_stay_removed_in_a_run(results) -> None:
    """What is gone after 6 rounds is gone after 12, and its weights are zeros."""
    half = run(0.1, rounds=6).eta
    full = results[0.1].eta
    gone = {g: k == 0 for g, k in half.keep.items()}
    assert any(g.any() for g in gone.values())
    assert all(not full.keep[g][mask].any() for g, mask in gone.items())
    on = structure.alive(results[0.1].algorithm.prior.groups, {g: (~m).float() for g, m in gone.items()}, full.mean)
    assert all(not v[z == 0].any() for v, z in zip(full.mean.values(), everywhere(on, full.mean).values(), strict=True))


def test_the_reported_accuracy_is_that_of_the_exported_model(results) -> None:
    for result in results.values():
        data = pooled(image_clients(CLIENTS, 40))
        with torch.no_grad():
            hits = (result.model()(data.x).argmax(1) == data.y).double().mean()
        assert result.accuracy == pytest.approx(float(hits))
