"""Personalised accuracy of all algorithms with the same small tuning budget.

    python benchmarks/personalised.py run --out personalised --setting labels --seeds 1      # goes on where it stopped
    python benchmarks/personalised.py run --out personalised --only fedavg,ditto --seeds 1,2,3
    python benchmarks/personalised.py run --out personalised --device cuda --jobs 8          # processes at once
    python benchmarks/personalised.py table --out personalised                               # Markdown, of what has run

Setting "labels": Fashion-MNIST, 100 clients with at most 5 labels each (5 shards); "skewed": Dirichlet(0.1); an MLP
784-100-10, for fedbn with a batch norm after its hidden layer, cohort 10, one local epoch, batch 20, 50 rounds.
"shakespeare": 504 roles as clients, a causal transformer of one block, batch 4, 20 rounds, FedSparse at density 0.4.

A fifth of every client's examples is its test set. Every algorithm has five tuning runs, of half as many rounds with
seed 1, on a validation set, a fifth of the rest, which do not see the test set: three learning rates, then with the
best of them two more values of the algorithm's own constant (CONSTANTS), or, if it has none, half and twice the rate.
Best is the lowest mean of nats after adapting; all seeds use it. All other arguments are the constructors' defaults.
`before` is the model that a client receives (with its own parameters, if it has any), `after` what it predicts with
when it has adapted to its training examples (Result.personal). Means and deciles are over clients, of the first 100.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from pareto import slug  # benchmarks/pareto.py
from tables import Row, mean, percent  # benchmarks/tables.py
from torch import nn

import fedprior as fp
from fedprior.core import Population
from fedprior.data.population import LazyPopulation
from fedprior.metrics import over_clients
from fedprior.rng import generator

HELD_OUT, LIMIT, TUNED = 0.2, 100, 1  # TUNED: the seed whose partition chooses the learning rate
OTHER = ("fednsl",)  # needs a model of rules, which is none of the settings'
CONSTANTS: dict[str, tuple[str, Any, Any]] = {
    "fedprox": ("precision", 0.1, 10.0),
    "fedavgm": ("momentum", 0.5, 0.97),
    "fedadagrad": ("server_lr", 0.03, 0.3),
    "fedadam": ("server_lr", 0.003, 0.03),
    "fedyogi": ("server_lr", 0.003, 0.03),
    "grouplasso": ("strength", 0.0003, 0.003),
    "fedrep": ("personal_epochs", 2, 10),
    "pfedme": ("strength", 5.0, 45.0),
    "ditto": ("strength", 0.1, 10.0),
    "pfedbayes": ("zeta", 0.1, 0.01),
    "pfedvem": ("rho", 0.1, 1.0),
    "fedpop": ("sigma", 0.05, 0.3),
    "feddyn": ("alpha", 0.03, 0.3),
    "fola": ("pull", 0.1, 10.0),
    "fedhb": ("scale", 10.0, 100.0),
    "learnedscale": ("floor", 0.001, 0.1),
    "laplace": ("scale", 0.15, 1.5),
    "horseshoe": ("scale", 0.15, 1.5),
    "fedpa": ("shrinkage", 0.001, 0.1),
    "pvi": ("trust", 0.01, 0.1),
    "fedep": ("trust", 0.01, 0.1),
    "fedsep": ("trust", 0.01, 0.1),
    "pfedbred": ("strength", 5.0, 45.0),
    "fedppd": ("temperature", 0.01, 1.0),
    "kure": ("strength", 1.0, 100.0),
    "decoupled": ("strength", 1.0, 100.0),
    "fedem": ("components", 2, 5),
    "ifca": ("clusters", 3, 5),
    "fedhbmixture": ("precision", 1.0, 100.0),
    "fedsparsemixture": ("clusters", 3, 5),
}
"""An algorithm's own constant, and the values that are tried beside its default."""


@dataclass(frozen=True)
class Setting:
    """Data and a model.

    Attributes:
        data: seed -> clients with held-out examples.
        model: (name of the algorithm, seed) -> its first model.
        rounds: of a run; tuning has half as many.
        batch_size: of all algorithms.
        rates: learning rates to choose from.
        own: arguments of algorithms whose defaults do not fit the model.
    """

    data: Callable[[int], Population]
    model: Callable[[str, int], nn.Module]
    rounds: int
    batch_size: int
    rates: tuple[float, ...]
    own: Mapping[str, Row] = field(default_factory=dict)


def fashion(scheme: str, seed: int) -> Population:
    train, _ = fp.data.load("fashion-mnist")
    if scheme == "labels":
        return fp.data.shards(train, clients=100, shards_per_client=5, seed=seed, holdout=HELD_OUT)
    return fp.data.dirichlet(train, clients=100, alpha=0.1, seed=seed, holdout=HELD_OUT)


def shakespeare(seed: int) -> Population:
    train, _ = fp.data.load("shakespeare", stride=80, every=True)
    return fp.data.by_key(train, seed=seed, holdout=HELD_OUT)


def perceptron(name: str, seed: int) -> nn.Module:
    layers = [*fp.models.mlp(784, (100,), seed=seed)]
    return nn.Sequential(*layers[:2], *([nn.BatchNorm1d(100)] if name == "fedbn" else []), *layers[2:])


def transformer(name: str, seed: int) -> nn.Module:
    return fp.models.char_transformer(80, depth=1, every=True, seed=seed)


WIDER: Mapping[str, Row] = {name: {"density": 0.4} for name in ("fedsparse", "fedsparsemixture")}

SETTINGS = {
    "labels": Setting(partial(fashion, "labels"), perceptron, 50, 20, (0.01, 0.04, 0.16)),
    "skewed": Setting(partial(fashion, "skewed"), perceptron, 50, 20, (0.01, 0.04, 0.16)),
    "shakespeare": Setting(shakespeare, transformer, 20, 4, (0.0025, 0.005, 0.01), WIDER),
}


def validated(clients: Population) -> LazyPopulation:
    """The same clients without their test sets: a part of what they train on is held out instead."""

    def make(index: int) -> fp.Client:
        client = clients[index]
        order = torch.randperm(len(client.train), generator=generator(0, index, "validation"))
        held = int(HELD_OUT * len(order))
        parts = client.train.take(order[held:]), client.train.take(order[:held]) if held else None
        return fp.Client(index, client.name, *parts)

    return LazyPopulation(len(clients), make)


def made(name: str, setting: Setting, lr: float, clients: int, own: Row) -> fp.Algorithm:
    """The algorithm with its defaults, but for `own`; some ask how many clients there are."""
    make = fp.ALGORITHMS[name]
    count = {"clients": clients} if "clients" in inspect.signature(make).parameters else {}
    return make(lr=lr, batch_size=setting.batch_size, **count, **setting.own.get(name, {}), **own)


def measure(setting: str, name: str, seed: int, device: str, tuning: bool, lr: float, own: Row) -> Row:
    """One run's numbers, with the learning rate `lr` and `own` as the algorithm's other arguments."""
    common, clients = SETTINGS[setting], SETTINGS[setting].data(seed)
    result = fp.run(
        made(name, common, lr, len(clients), own),
        common.model(name, seed),
        validated(clients) if tuning else clients,
        rounds=common.rounds // 2 if tuning else common.rounds,
        cohort=10,
        seed=seed,
        engine=fp.engines.Sequential(1) if device == "cpu" else "auto",
        device=device,
        progress=False,
    )
    rows = [r for r in result.personalised(validated(clients) if tuning else clients, LIMIT) if r["on"] == "held_out"]
    numbers = {key: value for key, spread in over_clients(rows).items() for key, value in flat(key, spread)}
    more = {
        "mb": (result.bytes_up + result.bytes_down) / 1e6,
        "seconds": result.seconds,
        "clients": len(rows),
        "device": device,
    }
    return {"setting": setting, "name": name, "seed": seed, "lr": lr, "own": own} | more | numbers


def flat(key: str, spread: dict[str, float]) -> list[tuple[str, float]]:
    return [(key, spread["mean"]), (f"{key}_worst_decile", spread["worst_decile"])]


Submit = Callable[..., Future[Any]]


def all_of(out: Path, device: str, submit: Submit, wanted: Sequence[tuple[Any, ...]], tuning: bool) -> list[Row]:
    """The numbers of runs (setting, name, seed, lr, own): those that are not in their files are made side by side."""
    paths = []
    for setting, name, seed, lr, own in wanted:
        constants = "-".join(f"{v:g}" for v in (lr, *own.values()))
        stem = slug(setting, name, seed)
        paths.append(out / "tuning" / f"{stem}-{constants}.json" if tuning else out / f"{stem}.json")
    running = {
        path: submit(measure, *run[:3], device, tuning, *run[3:])
        for path, run in zip(paths, wanted, strict=True)
        if not path.exists()
    }
    for path, future in running.items():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(future.result(), indent=1))
        part.replace(path)
    return [json.loads(path.read_text()) for path in paths]


def tuned(setting: str, name: str, several: Callable[..., list[Row]]) -> tuple[float, Row]:
    """The best learning rate and constant of five runs."""

    def best(choices: Sequence[tuple[float, Row]]) -> tuple[float, Row]:
        rows = several([(setting, name, TUNED, lr, own) for lr, own in choices], True)
        row = min(rows, key=lambda r: r["after_nats"])
        return row["lr"], row["own"]

    rates: list[tuple[float, Row]] = [(lr, {}) for lr in SETTINGS[setting].rates]
    lr, _ = best(rates)
    if name not in CONSTANTS:
        return best([*rates, (lr / 2, {}), (lr * 2, {})])
    constant, *values = CONSTANTS[name]
    return best([*rates, *((lr, {constant: value}) for value in values)])


def one(options: argparse.Namespace, submit: Submit, name: str) -> None:
    """One algorithm with all seeds; what it has is tuned first, if it has not been."""
    setting, several = options.setting, partial(all_of, options.out, options.device, submit)
    lr, own = tuned(setting, name, several)
    for row in several([(setting, name, int(seed), lr, own) for seed in options.seeds.split(",")], False):
        accuracy = 100 * row["after_accuracy"]
        print(f"{setting}: {name}, seed {row['seed']}, lr {lr:g} {own or ''}: {accuracy:.2f} %", flush=True)


def run(options: argparse.Namespace) -> None:
    """Every algorithm in a thread, which waits for runs in `jobs` processes; those that fail are named at the end."""
    os.environ["OMP_NUM_THREADS"] = "1"
    names = options.only.split(",") if options.only else [n for n in fp.ALGORITHMS if n not in OTHER]
    (options.out / "tuning").mkdir(parents=True, exist_ok=True)
    processes = ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (1,))
    with processes, ThreadPoolExecutor(len(names)) as threads:
        done = {name: threads.submit(one, options, processes.submit, name) for name in names}
    failures = [f"{name} ({error!r})" for name, future in done.items() if (error := future.exception())]
    if failures:
        raise SystemExit(f"failed: {'; '.join(failures)}")


def table(rows: Sequence[Row]) -> list[str]:
    """Means over seeds and, in brackets, largest minus smallest; the best `after` first."""
    names: dict[str, list[Row]] = {}
    for row in rows:
        names.setdefault(row["name"], []).append(row)
    columns = ["accuracy before, %", "after, %", "worst decile, %", "nats before", "nats after", "ECE after, %", "MB"]
    lines = [f"| algorithm | seeds | tuned | {' | '.join(columns)} |", "|" + "---|" * (3 + len(columns))]
    for name, mine in sorted(names.items(), key=lambda item: -mean(item[1], "after_accuracy")):
        chosen = dict.fromkeys(
            ", ".join([f"lr {r['lr']:g}", *(f"{k} {v:g}" for k, v in r["own"].items())]) for r in mine
        )
        cells: list[Any] = [name, ", ".join(str(r["seed"]) for r in mine), "; ".join(chosen)]
        cells += [percent(mine, key) for key in ("before_accuracy", "after_accuracy")]
        cells += [percent(mine, "after_accuracy_worst_decile")]
        cells += [f"{mean(mine, key):.3f}" for key in ("before_nats", "after_nats")]
        cells += [percent(mine, "after_calibration_error"), f"{mean(mine, 'mb'):,.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", choices=list(SETTINGS), default="labels")
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if options.command == "run":
        return run(options)
    for setting in SETTINGS:
        rows = [json.loads(path.read_text()) for path in sorted(options.out.glob(f"{setting}-*.json"))]
        if rows:
            print("\n".join([f"## {setting}", "", *table(rows), ""]))


if __name__ == "__main__":
    main()
