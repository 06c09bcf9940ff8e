"""How much faster is the slim network? Dense against slim on one thread, in PyTorch (eager) and in onnxruntime.

    python benchmarks/inference.py                        LeNet 20-50-500, cut to 8-16-56
    python benchmarks/inference.py --widths 5-10-40       another cut
    python benchmarks/inference.py --run runs/sparse      what a finished run left of its model

All networks of a batch size are timed in turn in one process, many times over; a cell is the median of the thread's CPU
time, which on an idle machine is the time that passes. "floor" is LeNet with one unit in each layer: no cut is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fedprior as fp
from fedprior import finished
from fedprior.objective import Objective
from fedprior.result import Result
from fedprior.rng import generator

TARGET = 4.0
Call = Callable[[], object]


@dataclass(frozen=True)
class Cell:
    """Median microseconds of CPU time of one forward pass."""

    engine: str
    batch: int
    dense_us: float
    slim_us: float
    floor_us: float

    @property
    def ratio(self) -> float:
        return self.dense_us / self.slim_us


def cut_lenet(widths: Sequence[int]) -> Result:
    """LeNet 20-50-500 as after a run that left the first `widths` units of its layers."""
    model = fp.models.lenet()
    inputs = torch.rand(64, 1, 28, 28, generator=generator(0, "inputs"))
    algorithm = fp.fedsparse(lambda_0=0.01).bind(model, inputs[:1])
    eta, _ = algorithm.start(Objective(model).params())
    for (_, keep), width in zip(sorted(eta.keep.items()), widths, strict=True):
        keep[width:] = 0.0
    return Result(algorithm, Objective(model), eta, [], inputs)


def whole(model: nn.Module, inputs: Tensor) -> Result:
    """The model with nothing cut."""
    algorithm = fp.fedavg()
    return Result(algorithm, Objective(model), algorithm.start(Objective(model).params())[0], [], inputs)


def onnx_session(result: Result, folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = fp.export(result, folder / "a.onnx").path
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def in_turn(calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
    """Median microseconds of CPU time of each call; one measurement takes a millisecond or more."""
    number = {}
    for name, call in calls.items():
        call()
        started = time.thread_time()
        call()
        number[name] = max(1, round(1e-3 / (time.thread_time() - started)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in calls.items():
            started = time.thread_time()
            for _ in range(number[name]):
                call()
            times[name].append((time.thread_time() - started) / number[name])
    return {name: 1e6 * median(values) for name, values in times.items()}


def cells(sides: Mapping[str, Result], batches: Sequence[int], seconds: float) -> list[Cell]:
    """Every engine at every batch size."""
    models = {side: result.model() for side, result in sides.items()}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {side: onnx_session(result, Path(folder)) for side, result in sides.items()}
    inputs, found = sides["slim"].inputs, []
    for batch in batches:
        x = inputs[torch.arange(batch) % len(inputs)]
        calls: dict[str, Call] = {f"eager {s}": lambda m=m, x=x: m(x) for s, m in models.items()}
        calls |= {f"onnxruntime {s}": lambda o=o, x=x: o.run(None, {"x": x.numpy()}) for s, o in sessions.items()}
        us = in_turn(calls, seconds)
        found += [
            Cell(e, batch, *(us[f"{e} {s}"] for s in ("dense", "slim", "floor"))) for e in ("eager", "onnxruntime")
        ]
    return found


@dataclass(frozen=True)
class Layer:
    """One layer at one batch size in eager PyTorch: median microseconds, and multiplications an example."""

    name: str
    batch: int
    dense_us: float
    slim_us: float
    dense_products: int
    slim_products: int


def layers(sides: Mapping[str, Result], batch: int, seconds: float) -> list[Layer]:
    """Where the time goes: each layer alone, on what reaches it."""
    calls: dict[str, Call] = {}
    products: dict[str, int] = {}
    for side in ("dense", "slim"):
        x = sides[side].inputs[torch.arange(batch) % len(sides[side].inputs)]
        for i, layer in enumerate(sides[side].model().children()):
            name = f"{side} {i} {type(layer).__name__}"
            calls[name], x = (lambda f=layer, x=x: f(x)), layer(x)
            weight = getattr(layer, "weight", torch.zeros(0))
            products[name] = weight.numel() * (x[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1)
    us = in_turn(calls, seconds)
    names = [name.removeprefix("dense ") for name in calls if name.startswith("dense ")]
    pairs = [(f"dense {name}", f"slim {name}") for name in names]
    return [Layer(n, batch, us[a], us[b], products[a], products[b]) for n, (a, b) in zip(names, pairs, strict=True)]


def show(found: Sequence[Cell], profile: Sequence[Layer]) -> None:
    console = Console(width=100)
    table = Table("engine", "batch", "dense us", "slim us", "ratio", f">= {TARGET:g}", "floor us")
    for c in found:
        reached = "yes" if c.ratio >= TARGET else "no"
        numbers = (f"{c.dense_us:,.0f}", f"{c.slim_us:,.0f}", f"{c.ratio:.2f}", reached, f"{c.floor_us:,.0f}")
        table.add_row(c.engine, str(c.batch), *numbers)
    console.print(table)
    table = Table("layer, eager", "batch", "dense us", "slim us", "ratio", "products", "left", "ratio")
    for p in profile:
        fewer = f"{p.dense_products / p.slim_products:.1f}" if p.slim_products else ""
        numbers = (f"{p.dense_us:,.0f}", f"{p.slim_us:,.0f}", f"{p.dense_us / p.slim_us:.1f}")
        table.add_row(p.name, str(p.batch), *numbers, f"{p.dense_products:,}", f"{p.slim_products:,}", fewer)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--widths", default="8-16-56", help="units left of LeNet's layers, without --run")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each batch size")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    slim = finished.load(options.run)[0] if options.run else cut_lenet([int(w) for w in options.widths.split("-")])
    dense, floor = slim.objective.model, fp.models.lenet((1, 1), 1)
    if not isinstance(dense, nn.Sequential) or str(dense) != str(fp.models.lenet()):
        parser.error(f"{options.run} is not a run of LeNet 20-50-500")
    sides = {"dense": whole(dense, slim.inputs), "slim": slim, "floor": whole(floor, slim.inputs)}
    left = {name: len(units) for name, units in slim.kept.items()}
    share = 100 * slim.parameters_left / slim.parameters
    print(f"{slim.parameters:,} parameters, {slim.parameters_left:,} left ({share:.2f} %), units left: {left}")
    with torch.inference_mode():
        found = cells(sides, options.batches, options.seconds)
        profile = [row for batch in options.batches for row in layers(sides, batch, options.seconds)]
    show(found, profile)
    if options.json:
        versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "cpus": os.cpu_count()}
        numbers = {"parameters": slim.parameters, "parameters_left": slim.parameters_left, "units_left": left}
        numbers |= {"machine": {"processor": platform.machine(), **versions}}
        numbers |= {"cells": [asdict(c) | {"ratio": c.ratio} for c in found], "layers": [asdict(p) for p in profile]}
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
