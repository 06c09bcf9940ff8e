"""Accuracy under attack: rules of robust.py and the plain sum, with a fifth of the clients hostile.

    python benchmarks/attacks.py [--rounds 30] [--alpha 1.0]

Setting: MLP 784-100-10 on 9,000 examples of Fashion-MNIST, 30 clients, all of them every round, 6 of them hostile;
Dirichlet(alpha), FedAvg with one vote a client, lr 0.1, one local epoch, batch 20, seed 0; accuracy in percent on the
10,000 test examples after the last round.
"""

from __future__ import annotations

import argparse
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
    "nan": lambda start, end: torch.full_like(end, float("nan")),
    "1e30": lambda start, end: torch.full_like(end, 1e30),
    "x 1000": lambda start, end: start + 1000 * (end - start),
    "sign": lambda start, end: start - 3 * (end - start),
    "labels": lambda start, end: end,
}
RULES: dict[str, Any] = {
    "sum": None,
    "norm bound": robust.NormBound(),
    "norm clip": robust.NormClip(),
    "median": robust.Median(),
    "trimmed mean": robust.TrimmedMean(0.2),
    "multi-Krum": robust.Krum(HOSTILE, CLIENTS - HOSTILE),
}


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
        return posteriors.Point({k: ATTACKS[self.attack](start[k], end[k]) for k in end}), state


def accuracy(rule: Any, attack: str, clients: Any, test: Examples, rounds: int) -> float:
    """After the last round."""
    algorithm = fp.fedavg(lr=0.1, weighting="uniform")
    algorithm = replace(algorithm, robust=rule, inference=Hostile(algorithm.inference, attack))
    model = torch.nn.Sequential(torch.nn.Flatten(), fp.models.mlp(784, (100,), 10))
    fields = {"rounds": rounds, "test": test, "evaluate_every": rounds, "progress": False}
    return (
        100 * fp.run(algorithm, model, clients, engine=engines.Sequential(1), **fields).history[-1].metrics["accuracy"]
    )


def main() -> None:
    """Print the table, a line a rule."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--alpha", type=float, default=1.0)
    args = parser.parse_args()
    train, test = fp.data.load("fashion-mnist")
    clients = fp.data.dirichlet(train.take(torch.arange(9000)), clients=CLIENTS, alpha=args.alpha, seed=0)
    print("| rule | " + " | ".join(ATTACKS) + " |\n|---|" + "---|" * len(ATTACKS), flush=True)
    for name, rule in RULES.items():
        cells = [f"{accuracy(rule, attack, clients, test, args.rounds):.1f}" for attack in ATTACKS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
