"""The sweep behind FedSparse's defaults: one factor at a time, chosen on validation examples, never on a test set.

    python benchmarks/sweep.py run --out sweep --setting fashion      # goes on where it stopped; one JSON a run
    python benchmarks/sweep.py run --out sweep --setting shakespeare --seeds 0,1 --only "default,lr 0.01"
    python benchmarks/sweep.py table --out sweep                      # Markdown, of what has been run

Settings, learning rates and rounds are those of pareto.py: density 0.05 of a LeNet on Fashion-MNIST, density 0.4 of a
character transformer on Shakespeare; "gates" is lambda_0 = 0.01, with gates that clients sample, on Fashion-MNIST. Of
every client's training examples 10 %, drawn at random, are put aside before training; these of all clients together are
the validation set. The test set is not looked at. `start` is given in densities, `hold` and `steps` in rounds; `keep`
is the probability of every gate at the start. Every run is one process with one thread, one run after the other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pareto import EVERY, SETTINGS, row, slug  # benchmarks/pareto.py
from tables import Row, grouped, mean, percent  # benchmarks/tables.py

import fedprior as fp
from fedprior.core import Population

HELD_OUT = 0.1
DEFAULT = "default"


@dataclass(frozen=True)
class Sweep:
    """Points around the defaults.

    Attributes:
        setting: of pareto.py.
        size: what decides how small the model gets, at the points without a value of their own.
        points: factor -> the values that are not the default's.
        fedavg: learning rates of the dense rival.
    """

    setting: str
    size: Mapping[str, float]
    points: Mapping[str, tuple[float, ...]]
    fedavg: tuple[float, ...]

    def runs(self) -> dict[str, Callable[[], fp.Algorithm]]:
        """The lines of the table: "default", "lr 0.1", ..., "fedavg lr 0.1", ..."""
        made: dict[str, Callable[[], fp.Algorithm]] = {DEFAULT: lambda: sparse(self.size)}
        for factor, values in self.points.items():
            for value in values:
                made[f"{factor} {value:g}"] = lambda f=factor, v=value: sparse({**self.size, f: v})
        return made | {f"fedavg lr {lr:g}": lambda lr=lr: fp.fedavg(lr=lr) for lr in self.fedavg}


SWEEPS = {
    "fashion": Sweep(
        "fashion",
        {"density": 0.05},
        {
            "lr": (0.1, 0.3),
            "momentum": (0.0, 0.8),
            "start": (1.0, 2.5),
            "hold": (20, 70),
            "steps": (5, 50),
            "activations": (0.0, 0.2, 0.3, 0.5),
        },
        (0.1, 0.2, 0.3),
    ),
    "gates": Sweep(
        "fashion",
        {"lambda_0": 0.01},
        {"lambda_0": (0.003, 0.03), "gate_lr": (0.0167, 0.15), "keep": (0.9, 0.999)},
        (),
    ),
    "shakespeare": Sweep(
        "shakespeare",
        {"density": 0.4},
        {
            "lr": (0.0025, 0.01, 0.02),
            "momentum": (0.0, 0.8),
            "start": (1.0, 2.5),
            "hold": (12,),
            "steps": (3,),
            "activations": (0.0,),
        },
        (0.0025, 0.005, 0.01, 0.02),
    ),
}
OF_THE_PRIOR = ("start", "hold", "steps", "keep")


def sparse(factors: Mapping[str, float]) -> fp.Algorithm:
    """FedSparse with some factors that are not the default's."""
    fields = {name: factors[name] for name in OF_THE_PRIOR if name in factors}
    algorithm = fp.fedsparse(**{k: v for k, v in factors.items() if k not in fields})  # type: ignore[arg-type]
    if "start" in fields:
        fields["start"] *= factors["density"]
    return replace(algorithm, prior=replace(algorithm.prior, **fields))  # type: ignore[type-var]


def data(setting: str, seed: int) -> tuple[Population, fp.Examples]:
    """The clients of pareto.py without a tenth of their examples, and these."""
    clients: Any = replace(SETTINGS[setting].data(seed)[0], holdout=HELD_OUT)  # type: ignore[type-var]
    held = [client.held_out for client in clients if client.held_out is not None]
    return clients, fp.Examples(torch.cat([h.x for h in held]), torch.cat([h.y for h in held]))


def one(sweep: str, name: str, seed: int, rounds: int, device: str) -> Row:
    """One run's numbers; accuracies are those on the validation set."""
    setting, algorithm = SWEEPS[sweep].setting, SWEEPS[sweep].runs()[name]()
    common = SETTINGS[setting]
    inference: Any = algorithm.inference
    lr = inference.lr if " lr " in f" {name}" else common.lr
    clients, validation = data(setting, seed)
    result = fp.run(
        replace(algorithm, inference=replace(inference, lr=lr, batch_size=common.batch_size)),
        common.model(seed=seed),
        clients,
        rounds=rounds,
        cohort=10,
        test=validation,
        seed=seed,
        engine=fp.engines.Sequential(1) if device == "cpu" else "auto",
        device=device,
        evaluate_every=EVERY,
        progress=False,
    )
    return row(sweep, name, seed, lr, result) | {"nats": result.nats, "rounds": rounds}


def run(options: argparse.Namespace) -> None:
    """All runs that have no numbers yet."""
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.only.split(",") if options.only else list(SWEEPS[options.setting].runs())
    for seed in map(int, options.seeds.split(",")):
        for name in names:
            path = options.out / f"{slug(options.setting, name, seed)}.json"
            if not path.exists():
                rounds = options.rounds or SETTINGS[SWEEPS[options.setting].setting].rounds
                numbers = one(options.setting, name, seed, rounds, options.device)
                path.write_text(json.dumps([numbers], indent=1))
                print(f"{path.stem}: {100 * numbers['tail']:.2f} %, {numbers['seconds']:.0f} s", flush=True)


def table(rows: list[Row], order: list[str]) -> list[str]:
    """Means over seeds, in brackets the spread; the difference is to the default's runs with the same seeds."""
    names = grouped(rows)
    default = {r["seed"]: r["tail"] for r in names.get(DEFAULT, [])}
    lines = [
        "| run | seeds | validation accuracy | against the default | nats | MB | parameters left |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (n for n in order if n in names):
        mine = names[name]
        moved = [100 * (r["tail"] - default[r["seed"]]) for r in mine if r["seed"] in default]
        against = f"{sum(moved) / len(moved):+.2f}" if moved and name != DEFAULT else ""
        cells = [name, ", ".join(str(r["seed"]) for r in mine), percent(mine, "tail"), against]
        cells += [f"{mean(mine, 'nats'):.3f}", f"{mean(mine, 'mb'):,.1f}", f"{mean(mine, 'parameters'):,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", choices=list(SWEEPS), default="fashion")
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rounds", type=int, help="default: the setting's own")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.command == "run":
        return run(options)
    for setting, sweep in SWEEPS.items():
        rows = [r for p in sorted(options.out.glob(f"{setting}-*.json")) for r in json.loads(p.read_text())]
        if rows:
            print("\n".join([f"## {setting}", "", *table(rows, list(sweep.runs())), ""]))


if __name__ == "__main__":
    main()
