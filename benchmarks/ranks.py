"""Milliseconds a round with one process, with workers, and with ranks that torchrun starts on this machine.

    python benchmarks/ranks.py [--only lenet,mlp] [--ranks 2] [--repeats 3]

The rows are those of engines.py. The sides take turns; a round's time is the median over the rounds after the first
three of all turns, on rank 0, and has all that a round has: hand-out, records, the sum over ranks. No evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

import torch
from engines import ROWS, ours

import fedprior as fp

SIDES = {"sequential": lambda: fp.engines.Sequential(1), "workers": fp.engines.Workers, "ranks": lambda: None}


def turn(name: str, side: str, ranks: int) -> list[float]:
    """One turn of one side, in processes of its own."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1"]
    command = [sys.executable, *(torchrun if side == "ranks" else []), __file__, "--one", f"{name};{side}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="ROW;SIDE: a process of the benchmark")
    parser.add_argument("--only", default="lenet,mlp,softmax")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.one is not None:
        name, side = options.one.split(";")
        torch.set_num_threads(1)
        times = ours(ROWS[name], SIDES[side]())
        if fp.engines.leads():
            print(json.dumps(times))
        return
    print(f"| ms a round | {' | '.join(SIDES)} |\n|---|{'---:|' * len(SIDES)}")
    for name in options.only.split(","):
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):
            for side in SIDES:
                times[side] += turn(name, side, options.ranks)
        cells = (f"{statistics.median(times[side]):.1f}" for side in SIDES)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
