"""Seconds and memory of a LeNet round against the density of the model, FedAvg and FedSparse in one run.

    python benchmarks/density.py [--json FILE]

Setting: LeNet 20-50-500 on Fashion-MNIST, 100 clients, Dirichlet(1.0), cohort 10, one local epoch, batch 20, one
thread, no evaluation, no workers (their time and memory would not be counted). Every density is a process of its own,
so that its peak memory is its own; the processes take turns, `--repeats` times. Seconds are medians over the rounds
after the first of each process. Memory is the peak resident set above that of the process with its data loaded, which
has also found the model's units once (FedAvg's too: libraries are loaded for that), in MB of 10^6 bytes; "eta" is what
the server holds at the end, without its optimiser's state of the same length.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

import fedprior as fp
from fedprior import priors, tree

# density (0: FedAvg), and what a share of the activations costs
CASES = (
    (0.0, 0.0),
    *((d, 0.1) for d in (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)),
    (0.1, 0.25),
    *((d, 0.5) for d in (0.1, 0.05, 0.02)),
)


def peak() -> float:
    """Peak resident memory of this process in MB; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def one(density: float, activations: float, rounds: int) -> dict[str, float]:
    """Rounds at one density from the start; 0 stands for FedAvg."""
    torch.set_num_threads(1)
    train, _ = fp.data.load("fashion-mnist")
    clients = fp.data.dirichlet(train, clients=100, alpha=1.0, seed=0)
    algorithm = fp.fedavg(lr=0.2)
    if density:
        algorithm = fp.fedsparse(lr=0.2, density=density)
        prior = priors.SharedGates(density, start=density, hold=0, steps=1, activations=activations)
        algorithm = replace(algorithm, prior=prior)
    fp.fedsparse().bind(fp.models.lenet(), train.x[:1])
    before = peak()
    result = fp.run(
        algorithm, fp.models.lenet(), clients, rounds=rounds, cohort=10, engine="sequential", progress=False
    )
    seconds = [r.seconds for r in result.history[1:]]
    return {
        "density": density,
        "activations": activations,
        "parameters": result.parameters_left,
        "seconds": statistics.median(seconds),
        "mb": peak() - before,
        "eta": sum(v.nbytes for v in tree.flatten(result.eta).values()),
        "bytes": result.history[-1].bytes_up + result.history[-1].bytes_down,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="DENSITY,ACTIVATIONS: a process of the benchmark")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one is not None:
        density, activations = map(float, options.one.split(","))
        print(json.dumps(one(density, activations, options.rounds)))
        return
    found: dict[tuple[float, float], list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(options.repeats):
        for density, activations in found:
            child = ["--one", f"{density},{activations}", "--rounds", str(options.rounds)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, *child]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[density, activations].append(json.loads(done.stdout.splitlines()[-1]))
    rows = [{k: statistics.median(r[k] for r in runs) for k in runs[0]} for runs in found.values()]
    print("| run | activations cost | parameters | seconds a round | faster | peak memory, MB | eta, MB | MB a round |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        name = f"FedSparse, density {row['density']:g}" if row["density"] else "FedAvg"
        faster = rows[0]["seconds"] / row["seconds"]
        print(
            f"| {name} | {row['activations']:g} | {row['parameters']:,.0f} | {row['seconds']:.2f} | {faster:.2f}x "
            f"| {row['mb']:.0f} | {row['eta'] / 1e6:.2f} | {row['bytes'] / 1e6:.2f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
