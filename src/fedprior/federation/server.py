"""The server's side on Flower: a ServerApp around `fedprior.run`, with the nodes as its engine."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fedprior import compare
from fedprior.algorithm import Algorithm
from fedprior.core import Examples
from fedprior.federation import flower
from fedprior.federation.engine import GridEngine, Roster
from fedprior.federation.settings import Settings
from fedprior.losses import Loss, PerExample
from fedprior.records import Round, read, write_atomically, write_private
from fedprior.result import Result
from fedprior.run import RECORDS, run

ABOUT, SECRET = "federation.json", "noise.key"


def server_app(
    algorithm: Algorithm,
    model: nn.Module,
    *,
    settings: Settings | None = None,
    test: Examples | None = None,
    example: Examples | None = None,
    loss: str | Loss | PerExample = "classification",
) -> flower.ServerApp:
    """A Flower ServerApp that runs `algorithm`; its records, checkpoints and model are those of a simulated run.

    Args:
        algorithm: the one that was simulated.
        model: the architecture and its initial parameters.
        settings: what a run's configuration does not say.
        test: for the central evaluation.
        example: what a client's examples look like, one or more of any value; the test set's, if there is one.
        loss: as in fedprior.run.
    """

    def main(grid: flower.Grid, run_config: Mapping[str, Any], run_id: int) -> None:
        wanted = (settings or Settings()).changed(run_config)
        serve(grid, algorithm, model, wanted, run_id, test, example, loss)

    return flower.app(main)


def serve(
    grid: flower.Grid,
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
