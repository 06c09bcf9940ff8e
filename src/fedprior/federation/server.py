"""The server's side on Flower: a ServerApp around `fedprior.run`, with the nodes as its engine."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flwr.app import Context  # pyright: ignore[reportMissingImports]
from flwr.serverapp import Grid, ServerApp  # pyright: ignore[reportMissingImports]
from torch import nn

from fedprior import compare
from fedprior.algorithm import Algorithm
from fedprior.core import Examples
from fedprior.federation.engine import GridEngine, Roster
from fedprior.losses import Loss, PerExample
from fedprior.records import Round, read, write_atomically, write_private
from fedprior.result import Result
from fedprior.run import RECORDS, run

ABOUT, SECRET = "federation.json", "noise.key"


@dataclass(frozen=True)
class Settings:
    """What `flwr run --run-config` may change, under these names.

    Attributes:
        rounds: of the run.
        clients: of the federation; client i lives on the node of partition i % nodes.
        cohort: clients sampled a round; 0 for all.
        nodes: SuperNodes, each with a partition of its own.
        seed: all randomness of the run derives from it.
        seconds: that a round waits for its nodes.
        out: folder of records, checkpoints and the model on the server; {run} is Flower's number of the run.
        resume: go on with the run in `out`.
    """

    rounds: int = 10
    clients: int = 3
    cohort: int = 0
    nodes: int = 3
    seed: int = 0
    seconds: float = 600.0
    out: str = "~/fedprior-runs/{run}"
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "clients", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.cohort <= self.clients:
            raise ValueError(f"cohort must be between 0 (all) and the {self.clients} clients, got {self.cohort}")
        if self.clients < self.nodes:
            raise ValueError(f"{self.nodes} nodes share {self.clients} clients: a node would have none")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")

    def changed(self, run_config: Mapping[str, Any]) -> Settings:
        """With the values of a run's configuration; keys that are not here are the job's own."""
        values: dict[str, Any] = {}
        for f in fields(self):
            if f.name in run_config:
                value, kind = run_config[f.name], type(getattr(self, f.name))
                value = float(value) if kind is float and type(value) is int else value
                if type(value) is not kind:
                    raise ValueError(f"{f.name} must be of type {kind.__name__}, got {value!r}")
                values[f.name] = value
        return replace(self, **values)


def server_app(
    algorithm: Algorithm,
    model: nn.Module,
    *,
    settings: Settings | None = None,
    test: Examples | None = None,
    example: Examples | None = None,
    loss: str | Loss | PerExample = "classification",
) -> ServerApp:
    """A Flower ServerApp that runs `algorithm`; its records, checkpoints and model are those of a simulated run.

    Args:
        algorithm: the one that was simulated.
        model: the architecture and its initial parameters.
        settings: what a run's configuration does not say.
        test: for the central evaluation.
        example: what a client's examples look like, one or more of any value; the test set's, if there is one.
        loss: as in fedprior.run.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        wanted = (settings or Settings()).changed(context.run_config)
        serve(grid, algorithm, model, wanted, context.run_id, test, example, loss)

    return app


def serve(
    grid: Grid,
    algorithm: Algorithm,
    model: nn.Module,
    settings: Settings,
    run_id: int,
    test: Examples | None = None,
    example: Examples | None = None,
    loss: str | Loss | PerExample = "classification",
) -> Result:
    """The server's whole run on any grid."""
    known = test if example is None else example
    if known is None:
        raise ValueError("the server has no data: give it test=, or example=, one example of the clients' shape")
    out = Path(settings.out.replace("{run}", str(run_id))).expanduser()
    history = read(out / RECORDS) if settings.resume else []
    key, secret = _key(out, run_id, settings.resume), _secret(out) if algorithm.privacy else 0
    engine = GridEngine(grid, settings.nodes, key, settings.seconds, history=history, secret=secret)
    result = run(
        algorithm,
        model,
        Roster(settings.clients, Examples(known.x[:2], known.y[:2])),
        rounds=settings.rounds,
        cohort=settings.cohort or None,
        test=test,
        seed=settings.seed,
        loss=loss,
        engine=engine,
        out=out,
        resume=settings.resume,
        progress=False,
        on_round=_tell,
    )
    compare.finish(result, out)
    print(f"{result.summary()}\nrecords, checkpoint and model: {out}", flush=True)
    return result


def _key(out: Path, run_id: int, resume: bool) -> str:
    """The run's key, a new one or that of the run in `out`; Flower's numbers of the run are kept beside it."""
    path = out / ABOUT
    if not resume and path.exists():
        raise FileExistsError(f"{out} holds a run already: write resume=true to go on, or another out")
    about = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"run": secrets.token_hex(8), "flower": []}
    )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**about, "flower": [*about["flower"], run_id]}).encode())
    return about["run"]


def _secret(out: Path) -> int:
    """What the run's noise derives from: a round that is run again after a crash has the same noise."""
    path = out / SECRET
    if not path.exists():
        write_private(path, f"{secrets.randbits(256):064x}".encode())
    text = path.read_text(encoding="utf-8")
    if len(text) != 64:
        raise ValueError(f"{path} is torn, and no round can have used it: remove it if {RECORDS} has no rounds")
    return int(text, 16)


def _tell(record: Round) -> None:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
    counts = f"{len(record.clients) - len(record.lost())} of {len(record.clients)} clients"
    size = f"{record.bytes_up:,} bytes up, {record.bytes_down:,} down"
    print(f"round {record.number}: {counts}, {size}, {record.seconds:.1f} s. {metrics}", flush=True)
