"""Milliseconds a round: fedprior's engines against the loop that a user writes by hand.

    python benchmarks/engines.py [--only lenet,mlp] [--repeats 3] [--device cuda] [--json FILE]

FedAvg, iid clients, learning rate 0.05, one local epoch; no evaluation. Every side is a process of its own, and the
sides take turns `--repeats` times, so that what else the machine does reaches all of them; the loop runs with one
thread and with all of them, and counts with the better. A round's time is the median over the rounds after the first
three of all its turns. "limit" is the time that the forward and backward passes would take if every floating-point
operation ran at the speed of the largest matrix product: FLOPs of PyTorch's own counter, 3 times those of forward.

The loop has what a practised user gives it, and nothing else: the parameters are copied into one model, plain
torch.optim.SGD, batches indexed from a tensor, a running weighted sum. No bytes, records, checks or drop-outs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fedprior as fp
from fedprior.cohort import sample
from fedprior.core import Population
from fedprior.rng import generator

LR = 0.05


@dataclass(frozen=True)
class Row:
    """A workload.

    Attributes:
        model: the network.
        clients: device -> the population, whose examples are there.
        cohort: clients a round.
        batch: examples a step.
        rounds: of one turn.
        stacks: are its layers those that can be stacked?
    """

    model: Callable[[], nn.Module]
    clients: Callable[[str], Population]
    cohort: int
    batch: int
    rounds: int
    stacks: bool = False


def fashion(clients: int, examples: int, device: str) -> Population:
    train, _ = fp.data.load("fashion-mnist")
    return fp.data.iid(train.take(torch.arange(clients * examples)).to(device), clients, seed=0)


def shakespeare(device: str) -> Population:
    train, _ = fp.data.load("shakespeare", stride=80)
    return fp.data.iid(train.take(torch.arange(6400)).to(device), 100, seed=0)


ROWS: Mapping[str, Row] = {
    "lenet": Row(fp.models.lenet, partial(fashion, 100, 600), 10, 20, 8),
    "mlp": Row(fp.models.mlp, partial(fashion, 100, 600), 10, 20, 20, stacks=True),
    "softmax": Row(fp.models.softmax, partial(fashion, 3000, 20), 100, 20, 60, stacks=True),
    "resnet": Row(lambda: fp.models.resnet(8, norm="group"), partial(fashion, 100, 100), 10, 20, 6),
    "gru": Row(lambda: fp.models.char_gru(80), shakespeare, 10, 16, 8),
}
SIDES = ("loop, 1 thread", "loop, all threads", "sequential", "workers", "stacked", "auto")


def loop(row: Row, device: str) -> list[float]:
    """The loop that a user writes by hand; milliseconds of each round."""
    clients = row.clients(device)
    model, times = row.model().to(device), []
    server = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for number in range(1, row.rounds + 1):
        started = time.perf_counter()
        total, count = {k: torch.zeros_like(v) for k, v in server.items()}, 0
        for index in sample(0, number, len(clients), row.cohort):
            data = clients[index].train
            model.load_state_dict(server)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for batch in torch.randperm(len(data), generator=generator(0, number, index)).split(row.batch):
                optimizer.zero_grad()
                F.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
                optimizer.step()
            for k, v in model.state_dict().items():
                total[k] += len(data) * v
            count += len(data)
        server = {k: v / count for k, v in total.items()}
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return times


def ours(row: Row, engine: object, device: str = "cpu") -> list[float]:
    """fp.run with one of the engines; milliseconds of each round."""
    algorithm = fp.fedavg(lr=LR, batch_size=row.batch)
    result = fp.run(
        algorithm,
        row.model(),
        row.clients(device),
        rounds=row.rounds,
        cohort=row.cohort,
        engine=engine,  # pyright: ignore[reportArgumentType]
        progress=False,
        device=device,
    )
    return [1000 * r.seconds for r in result.history]


def one(name: str, side: str, rounds: str = "", device: str = "cpu") -> list[float]:
    """One turn of one side, in this process; of other than the row's rounds, if they are given."""
    row = replace(ROWS[name], rounds=int(rounds)) if rounds else ROWS[name]
    torch.set_num_threads(1 if side == "loop, 1 thread" else os.cpu_count() or 1)
    if side.startswith("loop"):
        return loop(row, device)
    of = fp.engines
    engines = {"sequential": of.Sequential(1), "workers": of.Workers(), "stacked": of.Stacked(), "auto": of.Auto()}
    return ours(row, engines[side], device)


def possible(name: str, side: str, device: str) -> bool:
    """Stacks take some layers, and processes no GPU."""
    return ROWS[name].stacks if side == "stacked" else side != "workers" or device == "cpu"


def limit(name: str, device: str) -> float:
    """Milliseconds a round at the speed of the largest matrix product, with all threads."""
    row = ROWS[name]
    torch.set_num_threads(os.cpu_count() or 1)
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        torch.mm(a, b)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - started)
    peak = 2 * 2048**3 / min(times)
    clients = row.clients("cpu")
    x = clients[0].train.x
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        row.model()(x)
    return 1000 * 3 * counter.get_total_flops() * row.cohort / peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="ROW;SIDE;ROUNDS;DEVICE: a process of the benchmark")
    parser.add_argument("--only", default=",".join(ROWS))
    parser.add_argument("--sides", default=";".join(SIDES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(one(*options.one.split(";"))))
        return
    table = {}
    for name in options.only.split(","):
        there = [s for s in options.sides.split(";") if possible(name, s, options.device)]
        sides: dict[str, list[float]] = {side: [] for side in there}
        for _ in range(options.repeats):
            for side in sides:
                command = [sys.executable, __file__, "--one", f"{name};{side};;{options.device}"]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                sides[side] += json.loads(done.stdout.splitlines()[-1])[3:]
        table[name] = {side: statistics.median(times) for side, times in sides.items()}
        if any(side.startswith("loop") for side in sides):
            best = min(v for side, v in table[name].items() if side.startswith("loop"))
            floor = limit(name, options.device)
            print(f"{name}: limit {floor:.1f} ms")
            for side, ms in table[name].items():
                print(
                    f"  {side:20} {ms:9.1f} ms  {best / ms:5.2f}x the loop  {floor / ms:5.1%} of the limit", flush=True
                )
        else:
            print(name, table[name], flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
