"""Accuracy under attack: rules of robust.py and the plain mean, with a fifth of the clients hostile.

    python benchmarks/attacks.py [RULE ...] [--rounds 20] [--partition iid|dirichlet] [--seeds 3]

Setting: softmax regression (7,850 parameters: small, so that the tables take minutes) on the 60,000 training examples
of Fashion-MNIST, 30 clients, all of them every round, 6 of them hostile; iid, or Dirichlet(1.0); FedAvg with one vote
a client, lr 0.4, one local epoch, batch 200; accuracy in percent on the 10,000 test examples after the last round, the
mean over seeds of partition and run, and in brackets how far the seeds are apart. Rules that move slower than the mean
are not to lose for that alone: the run without liars gains about 0.1 a round after 20 rounds.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fedprior as fp
from fedprior import engines, posteriors, robust
from fedprior.core import Client, Examples

CLIENTS, HOSTILE = 30, 6

ATTACKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of where a client starts, and where it would arrive
    "none": lambda start, end: end,
    "invalid": lambda start, end: end,
    "1e30": lambda start, end: torch.full_like(end, 1e30),
    "x 1000": lambda start, end: start + 1000 * (end - start),
    "sign": lambda start, end: start - (end - start),
    "sign x 3": lambda start, end: start - 3 * (end - start),
    "labels": lambda start, end: end,
}
INVALID = (lambda start, end: end[:1], lambda start, end: torch.full_like(end, float("nan")))  # half of them each
RULES: dict[str, Any] = {
    "mean": None,
    "norm bound": robust.NormBound(),
    "norm clip": robust.NormClip(),
    "centred clip": robust.CentredClip(),
    "median": robust.Median(),
    "trimmed mean": robust.TrimmedMean(0.2),
    "Krum": robust.Krum(HOSTILE),
    "multi-Krum": robust.Krum(HOSTILE, CLIENTS - HOSTILE),
}
PARTITIONS: dict[str, Any] = {"iid": fp.data.iid, "dirichlet": functools.partial(fp.data.dirichlet, alpha=1.0)}


@dataclass(frozen=True)
class Hostile:
    """An E-step whose first HOSTILE clients lie."""

    honest: Any
    attack: str

    def start(self, prior: Any, eta: Any) -> Any:
        """As the honest one."""
        return self.honest.start(prior, eta)

    def e_step(self, objective: Any, prior: Any, eta: Any, client: Client, state: Any, rng: Any) -> Any:
        """Train, and then change what was learned, or before, the labels."""
        lies = client.index < HOSTILE
        if lies and self.attack == "labels":
            client = replace(client, train=Examples(client.train.x, 9 - client.train.y))
        q, state = self.honest.e_step(objective, prior, eta, client, state, rng)
        if not lies:
            return q, state
        start, end = prior.point(eta), q.mean()
        attack = INVALID[client.index % 2] if self.attack == "invalid" else ATTACKS[self.attack]
        return posteriors.Point({k: attack(start[k], end[k]) for k in end}), state


@functools.cache
def load() -> tuple[Examples, Examples]:
    """Training and test examples."""
    return fp.data.load("fashion-mnist")


def accuracy(rule: Any, attack: str, partition: str, rounds: int, seed: int) -> float:
    """After the last round."""
    train, test = load()
    clients = PARTITIONS[partition](train, clients=CLIENTS, seed=seed)
    algorithm = fp.fedavg(lr=0.4, batch_size=200, weighting="uniform")
    algorithm = replace(algorithm, robust=rule, inference=Hostile(algorithm.inference, attack))
    fields = {"rounds": rounds, "test": test, "evaluate_every": rounds, "progress": False, "seed": seed}
    result = fp.run(algorithm, fp.models.softmax(784, 10), clients, engine=engines.Sequential(1), **fields)
    return 100 * result.history[-1].metrics["accuracy"]


def main() -> None:
    """Print the table, a line a rule, and how long it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rules", nargs="*", help=f"of {', '.join(RULES)}; none: all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--partition", choices=list(PARTITIONS), default="iid")
    parser.add_argument("--seeds", type=int, default=3)
    args, began = parser.parse_args(), time.perf_counter()
    if strange := [name for name in args.rules if name not in RULES]:
        parser.error(f"unknown rule {strange[0]!r}; known: {', '.join(RULES)}")
    print("| rule | " + " | ".join(ATTACKS) + " |\n|---|" + "---|" * len(ATTACKS), flush=True)
    for name in args.rules or RULES:
        cells = []
        for attack in ATTACKS:
            found = [accuracy(RULES[name], attack, args.partition, args.rounds, seed) for seed in range(args.seeds)]
            cells.append(f"{sum(found) / len(found):.1f} ({max(found) - min(found):.1f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
