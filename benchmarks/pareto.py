"""Accuracy against bytes and against parameters: FedSparse and its rivals in one harness.

    python benchmarks/pareto.py run --out pareto                          # all runs; goes on where it stopped
    python benchmarks/pareto.py run --out pareto --only "fedsparse 5 %" --seeds 0
    python benchmarks/pareto.py table --out pareto                        # tables and plots of what has been run

Setting "fashion": LeNet 20-50-500 on Fashion-MNIST, 100 clients, Dirichlet(1.0), cohort 10, one local epoch, batch
20, 100 rounds; "skewed" is the same with Dirichlet(0.1). A seed draws the partition, the initial model, the cohorts
and all that the algorithms draw. Each run is a process of its own with one thread. Bytes are lengths of payloads,
both directions; MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fedprior as fp
from fedprior.metrics import evaluate
from fedprior.objective import Objective

PRUNED = (0.05, 0.1, 0.2)
EVERY = 5


@dataclass(frozen=True)
class Run:
    """One line of a table: an algorithm and its arguments, and the arguments of the model."""

    algorithm: Callable[..., fp.Algorithm]
    arguments: Mapping[str, Any]
    widths: Mapping[str, Any]


def hand_sized(c1: int, c2: int, hidden: int) -> Run:
    return Run(fp.fedavg, {}, {"channels": (c1, c2), "hidden": hidden})


def whole(algorithm: Callable[..., fp.Algorithm], **arguments: Any) -> Run:
    return Run(algorithm, arguments, {})


RUNS: Mapping[str, Run] = {
    "fedavg": whole(fp.fedavg),
    "fedavg int8": whole(fp.fedavg, value_type="int8", entropy="zlib"),
    "fedavg int4": whole(fp.fedavg, value_type="int4", entropy="zlib"),
    "top-k 1 %": whole(fp.topk, fraction=0.01),
    "top-k 10 %": whole(fp.topk, fraction=0.1),
    "dropout 0.5": whole(fp.feddropout, rate=0.5),
    "dropout 0.75": whole(fp.feddropout, rate=0.75),
    "group lasso": whole(fp.grouplasso, strength=1e-3),
    "dense 10-24-60": hand_sized(10, 24, 60),
    "dense 12-28-26": hand_sized(12, 28, 26),
    "dense 6-14-20": hand_sized(6, 14, 20),
    "fedsparse 5 %": whole(fp.fedsparse, density=0.05),
    "fedsparse 2 %": whole(fp.fedsparse, density=0.02),
    "fedsparse 10 %": whole(fp.fedsparse, density=0.1),
    "fedsparse 5 % int8": whole(fp.fedsparse, density=0.05, value_type="int8"),
    "fedsparse 5 % int4": whole(fp.fedsparse, density=0.05, value_type="int4"),
    "fedsparse 2 % int4": whole(fp.fedsparse, density=0.02, value_type="int4"),
    "fedsparse gates": whole(fp.fedsparse, lambda_0=0.01),
}
ALPHA = {"fashion": 1.0, "skewed": 0.1}


def one(out: Path, setting: str, name: str, seed: int, rounds: int, lr: float) -> None:
    """One run, in this process; its records go to a folder, its numbers to a file that is written last."""
    torch.set_num_threads(1)
    train, test = fp.data.load("fashion-mnist")
    clients = fp.data.dirichlet(train, clients=100, alpha=ALPHA[setting], seed=seed)
    run = RUNS[name]
    model = fp.models.lenet(**run.widths, seed=seed)
    folder = out / slug(setting, name, seed)
    result = fp.run(
        run.algorithm(lr=lr, **run.arguments),
        model,
        clients,
        rounds=rounds,
        cohort=10,
        test=test,
        seed=seed,
        out=folder,
        resume=folder.exists(),
        checkpoint_every=EVERY,
        evaluate_every=EVERY,
        progress=False,
    )
    rows = [row(setting, name, seed, lr, result)]
    if name == "fedavg":
        for density in PRUNED:
            small = Objective(fp.prune(result.model(), density, train.x[:1]))
            accuracy = evaluate(small, small.params(), test).means()["accuracy"]
            pruned = {
                "name": f"fedavg, then pruned to {100 * density:.0f} %",
                "parameters": small.count(small.params()),
            }
            rows.append({**rows[0], **pruned, "accuracy": accuracy, "tail": accuracy, "curve": []})
    (out / f"{slug(setting, name, seed)}.json").write_text(json.dumps(rows, indent=1))


def row(setting: str, name: str, seed: int, lr: float, result: fp.Result) -> dict[str, Any]:
    """The numbers of a run; `tail` is the mean of its last five evaluations, `curve` is (round, MB, accuracy)."""
    total, curve = 0, []
    for r in result.history:
        total += r.bytes_up + r.bytes_down
        if r.metrics:
            curve.append((r.number, total / 1e6, r.metrics["accuracy"]))
    return {
        "setting": setting,
        "name": name,
        "seed": seed,
        "lr": lr,
        "accuracy": result.accuracy,
        "tail": sum(a for _, _, a in curve[-5:]) / len(curve[-5:]),
        "mb": total / 1e6,
        "parameters": result.parameters_left,
        "seconds": sum(r.seconds for r in result.history),
        "curve": curve,
    }


def slug(setting: str, name: str, seed: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{setting} {name} {seed}")


def run_all(options: argparse.Namespace) -> None:
    """All runs that have no numbers yet, `--workers` at a time."""
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.only.split(",") if options.only else list(RUNS)
    jobs = [(name, seed) for seed in map(int, options.seeds.split(",")) for name in names]
    jobs = [(n, s) for n, s in jobs if not (options.out / f"{slug(options.setting, n, s)}.json").exists()]

    def start(job: tuple[str, int]) -> None:
        name, seed = job
        fixed = ["--out", str(options.out), "--setting", options.setting, "--rounds", str(options.rounds)]
        own = ["--lr", str(options.lr), "--only", name, "--seeds", str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, __file__, "one", *fixed, *own], check=True, env=environment)
        print(f"{options.setting}: {name}, seed {seed}", flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(start, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "one", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", choices=list(ALPHA), default="fashion")
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.command == "run":
        run_all(options)
    elif options.command == "one":
        one(options.out, options.setting, options.only, int(options.seeds), options.rounds, options.lr)
    else:
        from tables import write  # benchmarks/tables.py

        write(options.out)


if __name__ == "__main__":
    main()
