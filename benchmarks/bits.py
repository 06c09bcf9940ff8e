"""Accuracy of the final model at few bits: FedAvg, and what is trained for rounding.

    python benchmarks/bits.py [--seeds 0,1,2] [--rounds 50]

MLP 784-100-10 on Fashion-MNIST, 100 clients, Dirichlet(1.0), 10 a round, one local epoch, batch 20, learning rate 0.05.
Weights of dense layers and convolutions are rounded to the nearest point of a symmetric grid (rounding.rounded), after
training; "float32" is the model as it is. Means over seeds of the test set's accuracy, in brackets the largest minus
the smallest.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import fedprior as fp

BITS = (8, 6, 4, 3, 2)
ALGORITHMS = {
    "fedavg": lambda lr: fp.fedavg(lr),
    "kure 10 (default)": lambda lr: fp.kure(lr),
    "kure 100": lambda lr: fp.kure(lr, strength=100.0),
    "kure 1,000": lambda lr: fp.kure(lr, strength=1000.0),
    "apqn 4 bits (default)": lambda lr: fp.apqn(lr),
    "apqn 3 bits": lambda lr: fp.apqn(lr, bits=3),
    "apqn 2 bits": lambda lr: fp.apqn(lr, bits=2),
    "mqat 8, 4, 2 bits (default)": lambda lr: fp.mqat(lr),
    "mqat 2 bits": lambda lr: fp.mqat(lr, bits=(2,)),
}


def one(name: str, seed: int, rounds: int) -> list[float]:
    """Accuracy in float32, then at BITS."""
    train, test = fp.data.load("fashion-mnist")
    clients = fp.data.dirichlet(train, clients=100, alpha=1.0, seed=seed)
    model = fp.models.mlp(784, (100,), seed=seed)
    result = fp.run(
        ALGORITHMS[name](0.05),
        model,
        clients,
        rounds=rounds,
        cohort=10,
        test=test,
        seed=seed,
        engine=fp.engines.Sequential(1),
        evaluate_every=rounds,
        progress=False,
    )
    few = fp.rounding.by_bits(result, test, BITS)
    return [result.accuracy, *(few[bits]["accuracy"] for bits in BITS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| algorithm | float32 |", *(f"{bits} bits |" for bits in BITS))
    print("|---" * (2 + len(BITS)) + "|")
    for name in ALGORITHMS:
        runs = [one(name, int(seed), options.rounds) for seed in options.seeds.split(",")]
        cells = [[100 * value for value in column] for column in zip(*runs, strict=True)]
        print(f"| {name} |", *(f"{statistics.fmean(c):.1f} ({max(c) - min(c):.1f}) |" for c in cells), flush=True)


if __name__ == "__main__":
    main()
