"""Accuracy against bytes and against parameters: FedSparse and its rivals in one harness.

    python benchmarks/pareto.py run --out pareto                          # all runs; goes on where it stopped
    python benchmarks/pareto.py run --out pareto --only "fedsparse 5 %" --seeds 0
    python benchmarks/pareto.py table --out pareto                        # tables and plots of what has been run

Setting "fashion": LeNet 20-50-500 on Fashion-MNIST, 100 clients, Dirichlet(1.0), cohort 10, one local epoch, batch
20, 100 rounds; "skewed" is the same with Dirichlet(0.1). Setting "shakespeare": a causal transformer of two blocks
predicts every next character, windows of 80 that do not overlap, 504 roles as clients, cohort 10, one local epoch,
batch 4, 60 rounds. A seed draws the partition, the initial model, the cohorts and all that the algorithms draw. Each
run is a process of its own with one thread. Bytes are lengths of payloads, both directions; MB are 10^6 bytes.

Learning rates: of nats per example, which for Shakespeare are sums over 80 characters.
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fedprior as fp
from fedprior.codecs import Dense, Sparse
from fedprior.core import Population
from fedprior.metrics import evaluate
from fedprior.objective import Objective

EVERY = 5


@dataclass(frozen=True)
class Run:
    """One line of a table: an algorithm and its arguments, and the arguments of the model."""

    algorithm: Callable[..., fp.Algorithm]
    arguments: Mapping[str, Any]
    widths: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """Data and a model, and the runs on them with their defaults.

    Attributes:
        data: seed -> clients, and the examples of the central evaluation.
        model: takes the widths of a Run, and seed.
        runs: the lines of the setting's table.
        rounds: of each run.
        lr: of each run.
        batch_size: of each run.
        pruned: densities to which the model that fedavg trains is pruned.
    """

    data: Callable[[int], tuple[Population, fp.Examples]]
    model: Callable[..., torch.nn.Module]
    runs: Mapping[str, Run]
    rounds: int
    lr: float
    batch_size: int
    pruned: tuple[float, ...]


def hand_sized(**widths: Any) -> Run:
    return Run(fp.fedavg, {}, widths)


def whole(algorithm: Callable[..., fp.Algorithm], **arguments: Any) -> Run:
    return Run(algorithm, arguments, {})


def topk_int8_down(**arguments: Any) -> fp.Algorithm:
    """Top-k with the broadcast of "fedavg int8"."""
    return replace(fp.topk(**arguments), downlink=Dense("int8", "zlib"))


def dropout_int8(**arguments: Any) -> fp.Algorithm:
    """Federated dropout in int8 both ways, upwards as differences, as "fedsparse 5 % int8" has it."""
    return replace(fp.feddropout(**arguments), codec=Sparse("int8", "zlib"), delta=True)


LENET: Mapping[str, Run] = {
    "fedavg": whole(fp.fedavg),
    "fedavg int8": whole(fp.fedavg, value_type="int8", entropy="zlib"),
    "fedsparse 5 %": whole(fp.fedsparse, density=0.05),
    "fedsparse 5 % int8": whole(fp.fedsparse, density=0.05, value_type="int8"),
    "fedsparse 5 % int4": whole(fp.fedsparse, density=0.05, value_type="int4"),
    "dense 12-28-26": hand_sized(channels=(12, 28), hidden=26),
    "dense 12-28-26 momentum 0.5": Run(fp.fedavgm, {"momentum": 0.5}, {"channels": (12, 28), "hidden": 26}),
    "fedsparse 5 % fast": whole(fp.fedsparse, density=0.05, activations=0.5),
    "fedsparse 2 %": whole(fp.fedsparse, density=0.02),
    "fedsparse 10 %": whole(fp.fedsparse, density=0.1),
    "fedsparse 10 % fast": whole(fp.fedsparse, density=0.1, activations=0.5),
    "fedsparse 2 % int4": whole(fp.fedsparse, density=0.02, value_type="int4"),
    "top-k 1 %": whole(fp.topk, fraction=0.01),
    "top-k 1 % int8 down": whole(topk_int8_down, fraction=0.01),
    "dropout 0.5": whole(fp.feddropout, rate=0.5),
    "dropout 0.5 int8": whole(dropout_int8, rate=0.5),
    "fedavg int4": whole(fp.fedavg, value_type="int4", entropy="zlib"),
    "fedavg momentum 0.5": whole(fp.fedavgm, momentum=0.5),
    "group lasso 0.001": whole(fp.grouplasso, strength=1e-3),
    "fedsparse sampled gates": whole(fp.fedsparse, lambda_0=0.01),
}
TRANSFORMER: Mapping[str, Run] = {
    "fedavg": whole(fp.fedavg),
    "fedavg int8": whole(fp.fedavg, value_type="int8", entropy="zlib"),
    "dropout 0.5": whole(fp.feddropout, rate=0.5),
    "fedavg momentum 0.5": whole(fp.fedavgm, momentum=0.5),
    "dense 2 heads hidden 51": hand_sized(heads=2, hidden=51),
    "dense 2 heads hidden 51 momentum 0.5": Run(fp.fedavgm, {"momentum": 0.5}, {"heads": 2, "hidden": 51}),
    "dense width 38": hand_sized(width=38, head_dim=10, hidden=152),
    "fedsparse 40 %": whole(fp.fedsparse, density=0.4),
    "fedsparse 40 % int8": whole(fp.fedsparse, density=0.4, value_type="int8"),
}


def fashion(alpha: float, seed: int) -> tuple[Population, fp.Examples]:
    train, test = fp.data.load("fashion-mnist")
    return fp.data.dirichlet(train, clients=100, alpha=alpha, seed=seed), test


def shakespeare(seed: int) -> tuple[Population, fp.Examples]:
    """The same clients for all seeds: every role is one."""
    train, test = fp.data.load("shakespeare", stride=80, every=True)
    return fp.data.by_key(train), test


SETTINGS = {
    "fashion": Setting(partial(fashion, 1.0), fp.models.lenet, LENET, 100, 0.2, 20, (0.05, 0.1, 0.2)),
    "skewed": Setting(partial(fashion, 0.1), fp.models.lenet, LENET, 100, 0.2, 20, (0.05, 0.1, 0.2)),
    "shakespeare": Setting(
        shakespeare, partial(fp.models.char_transformer, 80, every=True), TRANSFORMER, 60, 0.01, 4, (0.4,)
    ),
}


def one(out: Path, setting: str, name: str, seed: int, rounds: int, lr: float, device: str) -> None:
    """One run, in this process; its records go to a folder, its numbers to a file that is written last."""
    torch.set_num_threads(1)
    common = SETTINGS[setting]
    clients, test = common.data(seed)
    run = common.runs[name]
    folder = out / slug(setting, name, seed)
    result = fp.run(
        run.algorithm(lr=lr, batch_size=common.batch_size, **run.arguments),
        common.model(**run.widths, seed=seed),
        clients,
        rounds=rounds,
        cohort=10,
        test=test,
        seed=seed,
        out=folder,
        resume=folder.exists(),
        checkpoint_every=EVERY,
        evaluate_every=EVERY,
        device=device,
        progress=False,
    )
    rows = [row(setting, name, seed, lr, result)]
    if name == "fedavg":
        for density in common.pruned:
            small = Objective(fp.prune(result.model().cpu(), density, test.x[:1]))
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
    names = options.only.split(",") if options.only else list(SETTINGS[options.setting].runs)
    jobs = [(name, seed) for seed in map(int, options.seeds.split(",")) for name in names]
    jobs = [(n, s) for n, s in jobs if not (options.out / f"{slug(options.setting, n, s)}.json").exists()]

    def start(job: tuple[str, int]) -> None:
        name, seed = job
        fixed = ["--out", str(options.out), "--setting", options.setting, "--rounds", str(options.rounds)]
        fixed += ["--device", options.device]
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
    parser.add_argument("--setting", choices=list(SETTINGS), default="fashion")
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, help="default: the setting's own")
    parser.add_argument("--lr", type=float, help="default: the setting's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    options.rounds = options.rounds or SETTINGS[options.setting].rounds
    options.lr = options.lr or SETTINGS[options.setting].lr
    if options.command == "run":
        run_all(options)
    elif options.command == "one":
        own = int(options.seeds), options.rounds, options.lr, options.device
        one(options.out, options.setting, options.only, *own)
    else:
        from tables import write  # benchmarks/tables.py

        write(options.out)


if __name__ == "__main__":
    main()
