"""Calibration, foreign examples and spreads over clients, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fedprior import Examples, metrics
from fedprior.objective import Objective, params_of
from fedprior.posteriors import Predictive
from fedprior.rng import generator


def linear(classes: int, seed: int | None = None) -> nn.Module:
    """Logits are the inputs themselves, so that their softmax is ours to choose; with a seed, weights are drawn."""
    model = nn.Linear(classes, classes, bias=False, dtype=torch.float64)
    rng = generator(seed or 0, "linear")
    drawn = torch.randn(classes, classes, generator=rng, dtype=torch.float64)
    model.weight.data.copy_(torch.eye(classes) if seed is None else drawn)
    return model


def measured(logits: Tensor, y: Tensor, bins: int, batch_size: int | None = None) -> dict[str, float]:
    model = linear(logits.shape[-1])
    return metrics.evaluate(Objective(model), params_of(model), Examples(logits, y), batch_size, bins).means()


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(v - top) for v in logits]
    return [w / sum(weights) for w in weights]


def by_loops(logits: Tensor, y: Tensor, bins: int) -> tuple[float, float]:
    """Brier score and calibration error of single labels."""
    brier, gaps = 0.0, [0.0] * bins
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        p = softmax(row)
        brier += sum((v - (c == label)) ** 2 for c, v in enumerate(p))
        confidence = max(p)
        place = next(b for b in range(bins) if confidence <= (b + 1) / bins)
        gaps[place] += (p.index(confidence) == label) - confidence
    return brier / len(y), sum(map(abs, gaps)) / len(y)


def drawn(size: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor]:
    rng = generator(len(size), classes, "logits")
    y = torch.randint(classes, size, generator=rng)
    return 2 * torch.randn(*size, classes, generator=rng, dtype=torch.float64), y


@pytest.mark.parametrize("bins", [1, 2, 4, 15])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_brier_and_calibration_error_are_those_of_loops(bins: int, classes: int, batch_size: int | None) -> None:
    logits, y = drawn((40,), classes)
    means = measured(logits, y, bins, batch_size)
    assert (means["brier"], means["calibration_error"]) == pytest.approx(by_loops(logits, y, bins), abs=1e-12)


def test_positions_of_a_sequence_count_as_examples() -> None:
    logits, y = drawn((6, 5), 3)
    means = measured(logits, y, 4)
    loops = by_loops(logits.flatten(0, 1), y.flatten(), 4)
    assert (means["brier"], means["calibration_error"]) == pytest.approx(loops, abs=1e-12)


FAR = 1000.0  # of two logits: softmax is exactly 1 and 0
KNOWN = {
    "sure and right": ([[FAR, 0.0]] * 4, [0] * 4, 0.0, 0.0),
    "sure and wrong": ([[FAR, 0.0]] * 4, [1] * 4, 2.0, 1.0),
    "half the time": ([[0.0, 0.0]] * 4, [0, 1, 0, 1], 0.5, 0.0),
    "never when it says half": ([[0.0, 0.0]] * 4, [1] * 4, 0.5, 0.5),
    "seven of ten at 0.7": ([[math.log(0.7), math.log(0.3)]] * 10, [0] * 7 + [1] * 3, 0.42, 0.0),
    "a guess of ten": ([[0.0] * 10] * 10, list(range(10)), 0.9, 0.0),
    "errors of two bins do not cancel": ([[0.0, 0.0], [FAR, 0.0]], [0, 1], (0.5 + 2) / 2, (0.5 + 1) / 2),
    "in one bin they do": ([[FAR, 0.0], [math.log(0.9), math.log(0.1)]], [1, 0], (2 + 0.02) / 2, (1 - 0.1) / 2),
}


@pytest.mark.parametrize("name", KNOWN)
def test_calibration_by_hand_made_bins(name: str) -> None:
    """Bins are ]0, 1/4], ]1/4, 1/2], ...: a confidence of exactly 0.5 is in the second one."""
    logits, y, brier, error = KNOWN[name]
    means = measured(torch.tensor(logits, dtype=torch.float64), torch.tensor(y), 4)
    assert (means["brier"], means["calibration_error"]) == pytest.approx((brier, error), abs=1e-12)


def test_sums_of_two_halves_are_those_of_the_whole() -> None:
    logits, y = drawn((30,), 3)
    model = linear(3)
    objective, phi = Objective(model), params_of(model)
    whole, *halves = (
        metrics.evaluate(objective, phi, Examples(logits[part], y[part]), bins=5)
        for part in (slice(None), slice(11), slice(11, None))
    )
    assert (halves[0] + halves[1]).means() == pytest.approx(whole.means(), abs=1e-12)


def by_pairs(negative: Sequence[float], positive: Sequence[float]) -> float:
    pairs = [(n, p) for n in negative for p in positive]
    return sum((p > n) + (p == n) / 2 for n, p in pairs) / len(pairs)


SCORES: dict[str, tuple[list[float], list[float], float | None]] = {
    "perfect": ([0.0, 1.0, 2.0], [3.0, 4.0], 1.0),
    "always wrong": ([3.0, 4.0], [0.0, 1.0, 2.0], 0.0),
    "all equal": ([1.0] * 3, [1.0] * 5, 0.5),
    "the same scores": ([0.1, 0.4, 0.9], [0.1, 0.4, 0.9], 0.5),
    "one pair, equal": ([2.0], [2.0], 0.5),
    "some ties": ([0.0, 1.0, 1.0, 2.0], [1.0, 2.0, 2.0, 5.0, 0.0], None),
    "infinite": ([0.0, math.inf], [math.inf, -math.inf], None),
}


@pytest.mark.parametrize("name", SCORES)
def test_auroc_is_the_share_of_pairs(name: str) -> None:
    negative, positive, known = SCORES[name]
    value = metrics.auroc(torch.tensor(negative), torch.tensor(positive))
    assert value == pytest.approx(by_pairs(negative, positive), abs=1e-12)
    assert known is None or value == known


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_of_random_scores_is_near_a_half(levels: int) -> None:
    """Four standard deviations of Mann and Whitney's statistic; ties only make it narrower."""
    rng = generator(levels, "scores")
    n, m = 300, 200
    negative, positive = (torch.randint(levels, (k,), generator=rng).double() for k in (n, m))
    value = metrics.auroc(negative, positive)
    assert value == pytest.approx(by_pairs(negative.tolist(), positive.tolist()), abs=1e-12)
    assert abs(value - 0.5) < 4 * math.sqrt((n + m + 1) / (12 * n * m))
    assert metrics.auroc(positive, negative) == pytest.approx(1 - value, abs=1e-12)


def test_auroc_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="auroc needs scores of both kinds, got 0 and 2"):
        metrics.auroc(torch.zeros(0), torch.zeros(2))


def test_foreign_examples_are_told_by_the_entropy_of_the_mixture() -> None:
    """By loops, for a predictive of two models with unequal weights."""
    one, two = (params_of(linear(3, seed)) for seed in (1, 2))
    predictive = Predictive((0.3, 0.7), (one, two))
    inside, outside = (Examples(*drawn(size, 3)) for size in ((9,), (12,)))

    def entropy(x: list[float]) -> float:
        p = [0.0] * 3
        for weight, phi in zip(predictive.weights, predictive.models, strict=True):
            logits = [sum(a * b for a, b in zip(row, x, strict=True)) for row in phi["weight"].tolist()]
            p = [a + weight * b for a, b in zip(p, softmax(logits), strict=True)]
        return -sum(v * math.log(v) for v in p)

    scores = [[entropy(x) for x in some.x.tolist()] for some in (inside, outside)]
    objective = Objective(linear(3))
    for some, wanted in zip((inside, outside), scores, strict=True):
        assert metrics.entropies(objective, predictive, some, 5).tolist() == pytest.approx(wanted, abs=1e-12)
    value = metrics.ood_auroc(objective, predictive, inside, outside)
    assert value == pytest.approx(by_pairs(*scores), abs=1e-12)


def test_unsure_of_all_that_is_foreign() -> None:
    model = linear(2)
    sure, unsure = (Examples(torch.tensor(x).double(), torch.zeros(3).long()) for x in ([[9.0, 0]] * 3, [[1.0, 0]] * 3))
    assert metrics.ood_auroc(Objective(model), params_of(model), sure, unsure) == 1
    assert metrics.ood_auroc(Objective(model), params_of(model), sure, sure) == 0.5


def test_probabilities_need_classes() -> None:
    model = linear(2)
    numbers = Examples(torch.zeros(3, 2).double(), torch.zeros(3, 2).double())
    with pytest.raises(ValueError, match="has no classes: calibration and entropy need probabilities"):
        metrics.ood_auroc(Objective(model, "regression"), params_of(model), numbers, numbers)


def row(seen: str, accuracy: float, nats: float) -> metrics.Row:
    return {"client": "c", "examples": 3, "after_accuracy": accuracy, "after_nats": nats, "seen": seen}


ROWS = [row("yes", 0.9, 0.1), row("no", 0.2, 3.0), row("yes", 0.7, 0.5), row("no", 0.4, 1.0), row("yes", 0.8, 0.3)]


def test_seen_and_unseen_clients_apart() -> None:
    """Their means are those of each kind, and weigh to that of all."""
    parts = metrics.by_seen(ROWS)
    assert parts == {"seen": [ROWS[0], ROWS[2], ROWS[4]], "unseen": [ROWS[1], ROWS[3]]}
    spreads = {kind: metrics.over_clients(rows) for kind, rows in parts.items()}
    assert spreads["seen"]["after_accuracy"]["mean"] == pytest.approx((0.9 + 0.7 + 0.8) / 3)
    assert spreads["unseen"]["after_nats"]["mean"] == pytest.approx((3.0 + 1.0) / 2)
    pooled = metrics.over_clients(ROWS)["after_accuracy"]["mean"]
    assert pooled == pytest.approx(sum(len(parts[k]) * spreads[k]["after_accuracy"]["mean"] for k in parts) / 5)


@pytest.mark.parametrize(("rows", "kinds"), [(ROWS[::2], ["seen"]), (ROWS[1::2], ["unseen"]), ([], [])])
def test_a_kind_without_clients_is_left_out(rows: list[metrics.Row], kinds: list[str]) -> None:
    parts = metrics.by_seen(rows)
    assert list(parts) == kinds and [r for part in parts.values() for r in part] == rows


def test_the_worst_decile_is_low_for_accuracies_and_high_for_the_rest() -> None:
    """Of eleven clients in order, the tenth from the better end: quantiles lie on the values."""
    rows = [row("yes", i / 10, float(i)) for i in range(11)]
    spread = metrics.over_clients(rows)
    assert spread["after_accuracy"]["worst_decile"] == pytest.approx(0.1)
    assert spread["after_nats"]["worst_decile"] == pytest.approx(9)
    assert spread["after_nats"]["median"] == 5 and spread["after_nats"]["std"] == pytest.approx(math.sqrt(10))
