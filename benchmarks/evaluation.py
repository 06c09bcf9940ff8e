"""Milliseconds of a central evaluation, against the loop that a user writes by hand and against a round.

    python benchmarks/evaluation.py [--only lenet,mlp] [--threads 1] [--seconds 10]

The workloads of benchmarks/engines.py and the whole test set of each: 10,000 images, or 2,000 windows of text. The
hand-written loop takes batches of 1,000 through the module in evaluation mode, and sums nats and hits. Both sides take
turns in one process for `--seconds`; medians. "round" is the median of a run's rounds by `auto`, which are training
and the wire alone, and "in a run" that of the same run's evaluations (`seconds_evaluate`), after the first three.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from engines import LR, ROWS, Row  # benchmarks/engines.py
from torch import nn

import fedprior as fp
from fedprior.metrics import evaluate
from fedprior.objective import Objective

WINDOWS = 2000


def tests(name: str) -> fp.Examples:
    """The test set of a workload."""
    if name == "gru":
        return fp.data.load("shakespeare", stride=80)[1].take(torch.arange(WINDOWS))
    return fp.data.load("fashion-mnist")[1]


@torch.inference_mode()
def by_hand(model: nn.Module, test: fp.Examples) -> tuple[float, float]:
    """Nats and accuracy."""
    nats = hits = 0.0
    for x, y in zip(test.x.split(1000), test.y.split(1000), strict=True):
        outputs = model(x)
        nats += float(F.cross_entropy(outputs, y, reduction="sum"))
        hits += float((outputs.argmax(1) == y).sum())
    return nats / len(test), hits / len(test)


def in_turn(sides: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, after one call that counts for nothing."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    for turn in range(10_000):
        for name, call in sides.items():
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
        if turn >= 3 and time.perf_counter() > end:
            break
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def in_a_run(row: Row, test: fp.Examples) -> tuple[float, float]:
    """Milliseconds of a round, and of its evaluation."""
    algorithm = fp.fedavg(lr=LR, batch_size=row.batch)
    clients = row.clients("cpu")
    result = fp.run(algorithm, row.model(), clients, rounds=row.rounds, cohort=row.cohort, test=test, progress=False)
    rounds = result.history[3:]
    return tuple(1000 * statistics.median(getattr(r, name) for r in rounds) for name in ("seconds", "seconds_evaluate"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ROWS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads = ("by hand", "fedprior", "faster", "round", "in a run")
    print(f"{'':8}{''.join(f'{head:>10}' for head in heads)}  ms, {options.threads} threads")
    for name in options.only.split(","):
        row, test = ROWS[name], tests(name)
        model = row.model().eval()
        objective = Objective(model)
        phi = objective.params()
        want, got = by_hand(model, test), evaluate(objective, phi, test).means()
        assert abs(want[0] - got["nats"]) < 1e-4 * max(1, abs(want[0])), (want, got)
        hand, ours = in_turn(
            {
                "hand": lambda m=model, t=test: by_hand(m, t),
                "ours": lambda o=objective, p=phi, t=test: evaluate(o, p, t),
            },
            options.seconds,
        ).values()
        of_round, evaluation = in_a_run(row, test)
        print(f"{name:8}{hand:10.1f}{ours:10.1f}{hand / ours:9.2f}x{of_round:10.1f}{evaluation:10.1f}", flush=True)


if __name__ == "__main__":
    main()
