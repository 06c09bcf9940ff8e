"""Do models notice what they were not trained on? Fashion-MNIST against handwritten digits.

    python benchmarks/outside.py --out personalised [--seed 1] [--only fedavg,fedpa]

Setting "labels" of personalised.py, and the arguments that its runs in the folder `--out` were tuned to. Every client
predicts, after it has adapted, for its held-out garments and for digits (8 x 8, each pixel as 3 x 3, in a frame of 2).
A cell is the mean over clients of the AUROC of the predictive's entropy (metrics.ood_auroc): 0.5 is chance, and 1 where
every digit leaves the client less sure than every garment.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import personalised  # benchmarks/personalised.py
import torch
from pareto import slug  # benchmarks/pareto.py
from torch.nn import functional as F

import fedprior as fp
from fedprior.metrics import evaluate, ood_auroc

POINT = ("fedavg", "fedprox", "fedavgm", "fedper", "ditto", "pfedme", "ifca")
BAYESIAN = (
    "fedpa",
    "fola",
    "pvi",
    "fedep",
    "fedsep",
    "fedppd",
    "fedhb",
    "fedhbmixture",
    "fedpop",
    "pfedvem",
    "pfedbayes",
)


def digits() -> fp.Examples:
    """As large as garments."""
    _, test = fp.data.load("digits")
    x = test.x.view(-1, 1, 8, 8).repeat_interleave(3, 2).repeat_interleave(3, 3)
    return fp.Examples(F.pad(x, (2, 2, 2, 2)), test.y)


def one(name: str, seed: int, tuned: personalised.Row) -> dict[str, float]:
    """Accuracy and AUROC after adapting, means over clients."""
    setting = personalised.SETTINGS["labels"]
    clients, outside = setting.data(seed), digits()
    result = fp.run(
        personalised.made(name, setting, tuned["lr"], len(clients), tuned["own"]),
        setting.model(name, seed),
        clients,
        rounds=setting.rounds,
        cohort=10,
        seed=seed,
        engine=fp.engines.Sequential(1),
        progress=False,
    )
    accuracies, told = [], []
    for client in clients:
        if client.held_out is not None:
            model = result.personal(client)
            accuracies.append(evaluate(result.objective, model, client.held_out).means()["accuracy"])
            told.append(ood_auroc(result.objective, model, client.held_out, outside))
    return {"accuracy": statistics.fmean(accuracies), "auroc": statistics.fmean(told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="of personalised.py run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| algorithm | accuracy after, % | AUROC, garments against digits |")
    print("|---|---|---|")
    for name in options.only.split(",") if options.only else (*POINT, *BAYESIAN):
        tuned = json.loads((options.out / f"{slug('labels', name, options.seed)}.json").read_text())
        row = one(name, options.seed, tuned)
        print(f"| {name} | {100 * row['accuracy']:.2f} | {row['auroc']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
