"""Robust rules by plain loops over random uploads, and a round of theirs with clients that are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fedprior as fp
from fedprior import robust, wire
from fedprior.codecs import schema_of
from fedprior.layer import Setting
from fedprior.records import ClientRecord
from fedprior.rng import generator

ENTRIES = 5


def middle(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def columns(rows: Tensor, of: Callable[[list[float]], float]) -> Tensor:
    return torch.tensor([of(column) for column in rows.T.tolist()], dtype=torch.float64)


def trimmed(share: float) -> Callable[[Tensor], Tensor]:
    def of(column: list[float]) -> float:
        cut = next(k for k in range(len(column)) if k >= share * len(column))  # at least the share
        cut = min(cut, (len(column) - 1) // 2)
        left = sorted(column)[cut : len(column) - cut]
        return sum(left) / len(left)

    return lambda rows: columns(rows, of)


def krum(attackers: int, keep: int) -> Callable[[Tensor], Tensor]:
    def of(rows: Tensor) -> Tensor:
        n, scores = len(rows), []
        for i in range(n):
            distances = sorted(float((rows[i] - rows[j]).square().sum()) for j in range(n) if j != i)
            scores.append(sum(distances[: n - attackers - 2]))
        best = sorted(range(n), key=lambda i: scores[i])[: min(keep, n - attackers)]
        return torch.stack([rows[i] for i in best]).mean(0)

    return of


def bounded(factor: float) -> Callable[[Tensor], Tensor]:
    def of(rows: Tensor) -> Tensor:
        most = factor * middle([float(row.norm()) for row in rows])
        return torch.stack([row for row in rows if float(row.norm()) <= most]).mean(0)

    return of


def shortened(factor: float) -> Callable[[Tensor], Tensor]:
    def of(rows: Tensor) -> Tensor:
        most = factor * middle([float(row.norm()) for row in rows])
        return torch.stack([row * min(1.0, most / float(row.norm())) for row in rows]).mean(0)

    return of


RULES: list[tuple[robust.Rule, Callable[[Tensor], Tensor]]] = [
    (robust.Mean(), lambda rows: columns(rows, lambda column: sum(column) / len(column))),
    (robust.Median(), lambda rows: columns(rows, middle)),
    *((robust.TrimmedMean(share), trimmed(share)) for share in (0.0, 0.1, 0.2, 0.35, 0.49)),
    *((robust.Krum(f, keep), krum(f, keep)) for f, keep in ((0, 1), (1, 1), (2, 1), (2, 4), (2, 100))),
    *((robust.NormBound(factor), bounded(factor)) for factor in (1.0, 1.3, 2.0)),
    *((robust.NormClip(factor), shortened(factor)) for factor in (0.7, 1.0, 1.5)),
]


@pytest.mark.parametrize("rule, plain", RULES, ids=[str(rule) for rule, _ in RULES])
def test_a_rule_is_what_a_loop_says_for_any_number_of_clients(
    rule: robust.Rule, plain: Callable[[Tensor], Tensor]
) -> None:
    for clients in range(7, 13):
        for seed in range(10):
            rng = generator(seed, "rows", clients)
            rows = torch.randn(clients, ENTRIES, generator=rng, dtype=torch.float64)
            rows = rows * (1 + 3 * torch.rand(clients, 1, generator=rng, dtype=torch.float64))
            estimate, why = rule.combine(rows)
            assert torch.allclose(estimate, plain(rows), rtol=1e-9, atol=1e-12), (clients, seed)
            assert len(why) == clients


REFUSED: dict[str, Callable[[], robust.Rule]] = {
    "share < 0.5, got 0.5": lambda: robust.TrimmedMean(0.5),
    "share < 0.5, got -0.1": lambda: robust.TrimmedMean(-0.1),
    "keep >= 1, got -1 and 1": lambda: robust.Krum(-1),
    "keep >= 1, got 0 and 0": lambda: robust.Krum(0, 0),
    "steps >= 1, got 0": lambda: robust.CentredClip(steps=0),
    "CentredClip needs a finite factor > 0, got 0.0": lambda: robust.CentredClip(0.0),
    "NormClip needs a finite factor > 0, got inf": lambda: robust.NormClip(float("inf")),
    "NormBound needs a finite factor > 0, got -1.0": lambda: robust.NormBound(-1.0),
}


@pytest.mark.parametrize("words", REFUSED)
def test_rules_that_mean_nothing_are_refused(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        REFUSED[words]()


@pytest.mark.parametrize("attackers", [0, 1, 4])
def test_krum_refuses_rounds_in_which_liars_may_be_their_own_neighbours(attackers: int) -> None:
    """It needs 2 f + 2 < n."""
    rows = torch.zeros(2 * attackers + 3, ENTRIES, dtype=torch.float64)
    robust.Krum(attackers).combine(rows)
    with pytest.raises(ValueError, match=f"needs {2 * attackers + 3} uploads"):
        robust.Krum(attackers).combine(rows[1:])


def test_a_round_leaves_out_whom_the_rule_names_and_counts_the_others() -> None:
    """Client 1 failed and client 3 lies, in its parameters alone, which are a thousandth of what gains are.

    Two of client 4's examples' worth (`clients` is 2 in what it sends) have one vote.
    """
    model = fp.models.mlp(4, (6,), 3)
    plain = replace(fp.fedsparse(0.1, density=0.3), weighting="uniform").bind(model, torch.zeros(1, 4))
    algorithm = replace(plain, prior=plain.prior.scheduled(3), robust=robust.NormBound(2.0))  # type: ignore
    eta, _ = algorithm.start({k: v.detach() for k, v in model.named_parameters()})
    known = wire.flat(algorithm.message(eta, algorithm.inference.start(algorithm.prior, eta)))

    def said(index: int) -> fp.Stats:
        sizes = {"phi": 0.01 * (100.0 if index == 3 else 1.0), "gain": 10.0}
        votes = 2.0 if index == 4 else 1.0
        rows = {
            k: v + sizes.get(k.split("/")[0], 0.0) * torch.randn(v.shape, generator=generator(index, k))
            for k, v in known.items()
        }
        return wire.unflat({k: votes * v for k, v in rows.items()}, votes)

    layer = Setting(algorithm, schema_of(known), 6, 0).layer(1, eta, {}, {})
    answered = [0, 2, 3, 4, 5]
    for i in answered:
        layer.receive(eta, said(i), f"client-{i}")
    records = [ClientRecord(i, f"client-{i}", "failed" if i == 1 else "ok", 1, 0, 0, 0.0) for i in range(6)]
    done = layer.finish(eta, None, records)
    assert [r.status for r in done.records] == ["ok", "failed", "ok", "rejected", "ok", "ok"]
    assert "client-3" in done.records[3].reason and "median norms" in done.records[3].reason
    assert done.total is not None and done.total.clients == 4
    for key, value in wire.flat(done.total).items():
        votes = [wire.flat(said(i))[key] / said(i).clients for i in (0, 2, 4, 5)]
        assert torch.allclose(value, torch.stack(votes).sum(0), rtol=1e-5, atol=1e-5), key
