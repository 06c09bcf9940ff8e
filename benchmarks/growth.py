"""Seconds and peak memory against cohort, population and parameters.

    python benchmarks/growth.py [--engines loop,workers,stacked] [--rounds 12] [--json FILE]

A network of one hidden layer, clients that are made when they are asked for, 20 examples and one step each; no
evaluation. Every point is a process of its own; seconds are the median of its rounds after the first three, memory is
the most that the process ever held, "+" what its workers held beside it: the most that each ever held, without the
pages that it shares with the process or with other workers when the last round is over (Linux only). A client's time
and a round's are the slope and the intercept of a straight line through the points of the first table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import fedprior as fp
from fedprior.core import Engine
from fedprior.rng import generator

FEATURES, CLASSES, EXAMPLES = 16, 4, 20
ENGINES: dict[str, Callable[[], Engine]] = {
    "loop": lambda: fp.engines.Sequential(1),
    "workers": fp.engines.Workers,
    "stacked": fp.engines.Stacked,
}
COHORTS = [10, 30, 100, 300, 1000]
POPULATIONS = [100, 10_000, 1_000_000]
HIDDEN = {10_000: 476, 100_000: 4_762, 1_000_000: 47_619, 10_000_000: 476_190}  # 21 parameters a hidden unit


def client(index: int) -> fp.Client:
    """Made from its number alone."""
    rng = generator(0, index, "growth")
    x = torch.randn(EXAMPLES, FEATURES, generator=rng)
    return fp.Client(index, f"client-{index}", fp.Examples(x, torch.randint(CLASSES, (EXAMPLES,), generator=rng)))


def one(engine: str, cohort: int, population: int, hidden: int, rounds: int) -> dict[str, float]:
    """Milliseconds a round, and megabytes of the process and of its workers."""
    torch.set_num_threads(1)
    beside = 0.0

    def look(record: fp.Round) -> None:
        nonlocal beside
        if record.number == rounds:
            beside = sum(own_memory(worker.pid) for worker in multiprocessing.active_children())

    result = fp.run(
        fp.fedavg(lr=0.05),
        fp.models.mlp(FEATURES, (hidden,), CLASSES),
        fp.data.LazyPopulation(population, client),
        rounds=rounds,
        cohort=cohort,
        engine=ENGINES[engine](),
        progress=False,
        on_round=look,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ms": 1000 * statistics.median(r.seconds for r in result.history[3:]), "mb": peak, "beside": beside}


def own_memory(pid: int | None) -> float:
    """Megabytes that a living process held at its peak, without those that it shares with others now."""
    peak = fields(f"/proc/{pid}/status")["VmHWM"]
    now = fields(f"/proc/{pid}/smaps_rollup")
    return (peak - now["Shared_Clean"] - now["Shared_Dirty"]) / 1024


def fields(path: str) -> dict[str, int]:
    """The lines of a file of /proc that are in kB."""
    lines = [line.split() for line in Path(path).read_text().splitlines() if line.endswith(" kB")]
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


def apart(engine: str, cohort: int, population: int, hidden: int, rounds: int) -> dict[str, float]:
    """`one`, in a process of its own."""
    point = json.dumps([engine, cohort, population, hidden, rounds])
    out = subprocess.run([sys.executable, __file__, "--one", point], check=True, capture_output=True, text=True).stdout
    return json.loads(out)


def table(title: str, what: str, points: dict[str, dict[int, dict[str, float]]]) -> str:
    """One line a point."""
    head = " | ".join(f"{e}, ms | {e}, MB" for e in points)
    lines = [f"## {title}", "", f"| {what} | {head} |", "|---" * (1 + 2 * len(points)) + "|"]
    for value in next(iter(points.values())):
        cells = [f"{points[e][value]['ms']:,.1f} | {memory(points[e][value])}" for e in points]
        lines.append(f"| {value:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def memory(point: dict[str, float]) -> str:
    """Of the process, and of its workers if it has any."""
    return f"{point['mb']:,.0f}" + (f" + {point['beside']:,.0f}" if point["beside"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="a process of the benchmark")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(one(*json.loads(options.one))))
        return
    names, rounds = options.engines.split(","), options.rounds
    small = HIDDEN[10_000] // 10
    tables = {
        "Cohort": {e: {c: apart(e, c, 2000, small, rounds) for c in COHORTS} for e in names},
        "Population": {e: {p: apart(e, 10, p, small, rounds) for p in POPULATIONS} for e in names},
        "Parameters": {e: {p: apart(e, 10, 100, h, rounds) for p, h in HIDDEN.items()} for e in names},
    }
    whats = {"Cohort": "clients a round", "Population": "clients", "Parameters": "parameters"}
    for title, points in tables.items():
        print(table(title, whats[title], points), flush=True)
    for engine, points in tables["Cohort"].items():
        slope, constant = np.polyfit(list(points), [p["ms"] for p in points.values()], 1)
        print(f"{engine}: {slope:.3f} ms a client, {constant:.1f} ms a round")
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
