"""A finished run, from the files in its folder (compare.py): the Result that `run` gave back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedprior import checkpoint, tree, wire
from fedprior import config as configs
from fedprior.algorithm import Algorithm
from fedprior.codecs import PayloadError, schema_of
from fedprior.compare import TOML, build, holds_run, planned
from fedprior.config import Config
from fedprior.core import Eta, Params
from fedprior.objective import Objective
from fedprior.records import read
from fedprior.result import Result, some_inputs
from fedprior.rows import RESULTS
from fedprior.run import RECORDS, STATES
from fedprior.store import DiskStore


def load(folder: Path) -> tuple[Result, Config]:
    """The result of the run in `folder`, on the CPU, and its configuration.

    Raises:
        ValueError: for a folder without a run, with several, with one that is not finished, or whose files do not
            belong together.
    """
    config = _config(folder)
    saved = checkpoint.read(folder)
    done = 0 if saved is None else saved.number
    made = config.make_algorithm()
    may_stop = made.budget is not None or made.privacy is not None
    spent = may_stop and (folder / RESULTS).exists()
    if saved is None or (done < config.run.rounds and not spent):
        again = f"fedprior run {folder / TOML} --resume {folder}"
        raise ValueError(f"{folder} has {done} of {config.run.rounds} rounds; to finish it: {again}")
    experiment = build(replace(config, run=replace(config.run, device="cpu")))
    objective = Objective(experiment.model, experiment.loss)
    algorithm = planned(experiment, objective)
    like, _ = algorithm.start(objective.params())
    if not _fits(algorithm, like, saved.eta):
        raise ValueError(f"the checkpoint in {folder} is not of the model and algorithm in its {TOML}")
    inputs = some_inputs(experiment.clients, experiment.test)
    store = DiskStore(folder / STATES)
    result = Result(algorithm, objective, tree.unflatten(like, saved.eta), read(folder / RECORDS), inputs, store)
    return result, config


def _fits(algorithm: Algorithm, like: Eta, saved: Params) -> bool:
    """Has the saved eta, flat, the shapes of one of this model?"""
    try:
        return schema_of(tree.flatten(wire.sized(algorithm, like, saved))) == schema_of(saved)
    except PayloadError:
        return False


def _config(folder: Path) -> Config:
    """run.toml, or why there is none."""
    if (folder / TOML).exists():
        return configs.read(folder / TOML)
    if holds_run(folder):
        raise ValueError(
            f"{folder} was written by fedprior.run(out=...): it has no {TOML} that says what the model is. In Python, "
            "run(..., resume=True) gives the finished run's result back, and fedprior.export(result, FILE) exports it"
        )
    if runs := sorted(str(path.parent) for path in folder.glob(f"*/{TOML}")):
        raise ValueError(f"{folder} is a comparison; give one of its runs: {', '.join(runs)}")
    raise ValueError(f"{folder} holds no run: it has no {TOML}")
