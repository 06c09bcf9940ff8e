"""From a Config to a run in a folder, and several algorithms on the same clients and the same initial model.

A run's folder holds run.toml, records.jsonl, the checkpoint and, once it is finished, clients.json (the final model
on each client), personalised.json (before and after a client adapts; only where examples of clients are held out),
model.safetensors (its parameters) and results.json (one row of numbers), which is written last. A comparison's folder
holds one such folder an algorithm and the rows of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from fedprior import config as configs
from fedprior import data, layer, personalised, planning
from fedprior.algorithm import Algorithm
from fedprior.checkpoint import INDEX
from fedprior.checks import check_device, check_sizes
from fedprior.config import AUTOENCODERS, TABLES, Config, DataConfig
from fedprior.core import Examples, Population
from fedprior.data.shakespeare import VOCABULARY
from fedprior.engines import leads, named
from fedprior.objective import Objective
from fedprior.progress import doing
from fedprior.records import read, write_atomically
from fedprior.result import Result
from fedprior.rng import generator
from fedprior.rows import RESULTS, Row, as_row, finite, read_rows, write_json
from fedprior.run import RECORDS, run

TOML, CLIENTS, MODEL = "run.toml", "clients.json", "model.safetensors"
_FREE = {
    "run": {"rounds", "evaluate_every", "checkpoint_every", "engine", "timeout_seconds"},
    "data": {"folder", "path"},
}


@dataclass(frozen=True)
class Experiment:
    """A Config with what it describes.

    Attributes:
        config: complete, its model resolved.
        clients: the partition.
        test: for the central evaluation; None if there is no such example.
        model: initialised.
        loss: "classification", "regression" for floating targets, "autoencoder" for a model of AUTOENCODERS.
    """

    config: Config
    clients: Population
    test: Examples | None
    model: nn.Module
    loss: str


def build(config: Config) -> Experiment:
    """Load, partition, initialise; a ValueError for sizes that do not fit together."""
    check_device(config.run.device)
    train, test = _load(config.data, config.run.seed)
    scheme = config.data.partition
    if scheme == "auto":
        scheme = "dirichlet" if train.keys is None else "by_key"
    clients = _partition(replace(config.data, partition=scheme), train, config.run.seed)
    check_sizes(clients, config.run.seed, config.run.cohort, {})
    outputs = len(VOCABULARY) if config.data.name == "shakespeare" else _outputs(train, test)
    model = configs.resolve(config.model, config.data.name, train.x, outputs, config.run.seed)
    config = replace(config, data=replace(config.data, partition=scheme, clients=len(clients)), model=model)
    loss = "regression" if train.y.is_floating_point() else "classification"
    if model.name in AUTOENCODERS:
        clients, test, loss = data.autoencoding(clients), data.autoencoding(test), "autoencoder"
    return Experiment(config, clients, test if len(test) else None, _fitting_model(config, train), loss)


def _fitting_model(config: Config, train: Examples) -> nn.Module:
    """The model, tried on one example in evaluation mode: running moments stay as they were."""
    model = config.make_model()
    try:
        with torch.no_grad():
            model.eval()(train.x[:1])
    except (RuntimeError, IndexError, TypeError) as error:
        shape = tuple(train.x.shape[1:])
        raise ValueError(
            f"the model {config.model.name!r} does not fit examples of shape {shape}, {train.x.dtype}: {error}"
        ) from error
    return model.train()


def _outputs(train: Examples, test: Examples) -> int:
    """The number of a model's outputs: one for a floating target, else one a class."""
    if train.y.is_floating_point():
        return 1
    labels = torch.cat([train.y, test.y])
    if int(labels.min()) < 0:
        raise ValueError(f"classes are numbered from 0 up, and the target has {int(labels.min())}; write them as text")
    outputs, distinct = 1 + int(labels.max()), len(labels.unique())
    if outputs > 10 * distinct:
        raise ValueError(
            f"the target has {distinct} classes with numbers up to {outputs - 1}: number them 0, 1, 2, ..., "
            "or write them as text"
        )
    return outputs


def _load(source: DataConfig, seed: int) -> tuple[Examples, Examples]:
    """Train and test examples."""
    if source.name not in TABLES:
        return data.load(source.name, source.folder)
    table: Callable[..., Examples] = data.from_csv if source.name == "csv" else data.from_parquet
    try:
        examples = table(source.path, source.target, source.client)
    except ValueError as error:
        raise ValueError(f"cannot read {source.path}: {error}") from error
    # a model's outputs are (n, 1), and so must the targets be
    y = examples.y[:, None] if examples.y.is_floating_point() else examples.y
    order = torch.randperm(len(y), generator=generator(seed, "test_fraction"))
    cut = round(source.test_fraction * len(y))
    owners = examples.keys
    keys = None if owners is None else [str(owners[i]) for i in order[cut:].tolist()]
    return Examples(examples.x[order[cut:]], y[order[cut:]], keys), Examples(examples.x[order[:cut]], y[order[:cut]])


def _partition(source: DataConfig, train: Examples, seed: int) -> Population:
    """The clients, as [data] deals them."""
    if source.partition == "by_key":
        return data.by_key(train, seed=seed, holdout=source.holdout)
    if source.partition == "dirichlet":
        return data.dirichlet(train, source.clients, source.alpha, seed, holdout=source.holdout)
    if source.partition == "shards":
        return data.shards(train, source.clients, source.shards_per_client, seed, source.holdout)
    return data.iid(train, source.clients, seed, source.holdout)


def holds_run(folder: Path) -> bool:
    """Is there a run in the folder, finished or not?"""
    return (folder / RECORDS).exists() or (folder / INDEX).exists()


def holds_comparison(folder: Path) -> bool:
    """Is there a comparison, or a run?"""
    return holds_run(folder) or any(holds_run(path.parent) for path in folder.glob(f"*/{RECORDS}"))


def execute(experiment: Experiment, folder: Path, resume: bool = False, progress: bool | None = None) -> Row:
    """Run into `folder` and write what a finished run has; refuse before there is a folder. Of ranks, rank 0 writes."""
    config = experiment.config
    engine = named(config.run.engine, config.run.threads, config.run.timeout_seconds)
    planned(experiment, Objective(experiment.model, experiment.loss))
    if leads():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / TOML, configs.to_toml(config).encode())
    result = run(
        config.make_algorithm(),
        experiment.model,
        experiment.clients,
        rounds=config.run.rounds,
        cohort=config.run.cohort,
        test=experiment.test,
        seed=config.run.seed,
        loss=experiment.loss,
        engine=engine,
        availability=config.availability,
        device=config.run.device,
        out=folder,
        resume=resume,
        checkpoint_every=config.run.checkpoint_every,
        evaluate_every=config.run.evaluate_every,
        progress=progress,
    )
    if not leads():
        return as_row(result.row())
    name = config.algorithm.name
    with doing(f"{name}: the final model on each client", progress):
        write_json(folder / CLIENTS, [finite(row) for row in result.per_client(experiment.clients)])
    with doing(f"{name}: clients before and after they adapt", progress):
        personalised.write(result, experiment.clients, folder)
    return finish(result, folder)


def planned(experiment: Experiment, objective: Objective) -> Algorithm:
    """The algorithm as it runs: groups, schedule, noise; a ValueError for what model, data and engine do not allow."""
    settings, clients = experiment.config.run, experiment.clients
    rounds, cohort = settings.rounds, settings.cohort
    x = clients[0].train.x[:1]
    algorithm, eta, schema = planning.prepare(experiment.config.make_algorithm(), objective, x, rounds, cohort)
    if not algorithm.layered:
        return algorithm
    engine = named(settings.engine, settings.threads, settings.timeout_seconds)
    setting = layer.Setting(algorithm, schema, cohort, settings.seed)
    return layer.plan(setting, eta, objective, engine, rounds, len(clients))


def finish(result: Result, folder: Path) -> Row:
    """Write the model's parameters and the row of numbers."""
    params = {name: value.detach().cpu().contiguous() for name, value in result.params.items()}
    write_atomically(folder / MODEL, save(params))
    row = as_row(result.row())
    write_json(folder / RESULTS, [row])
    return row


def row_of_records(folder: Path) -> Row:
    """The row of a run, finished or not, from its records and its run.toml."""
    rounds, toml = read(folder / RECORDS), folder / TOML
    config = configs.read(toml) if toml.exists() else None
    objective = Objective(config.make_model()) if config else None
    metrics = next((r.metrics for r in reversed(rounds) if r.metrics), {})
    return as_row(
        {
            **metrics,
            "algorithm": config.algorithm.name if config else folder.absolute().name,
            "bytes_up": sum(r.bytes_up for r in rounds),
            "bytes_down": sum(r.bytes_down for r in rounds),
            "parameters": objective.count(objective.params()) if objective else None,
            "parameters_left": rounds[-1].parameters_left if rounds else None,
            "seconds": sum(r.seconds + r.seconds_evaluate for r in rounds),
            "rounds": len(rounds),
        }
    )


def check_same(folder: Path, config: Config, algorithm: bool = True) -> None:
    """A ValueError unless the run in `folder` was started with `config`, but for its length and the data's place."""
    if not (folder / TOML).exists():
        raise ValueError(f"{folder} holds no run: it has no {TOML}")
    before, now = configs.read(folder / TOML).sections(), config.sections()
    if before.keys() != now.keys():
        had, has = (", ".join(f"[{name}]" for name in some) for some in (before, now))
        raise ValueError(f"cannot go on with {folder}: its sections were {had} and are now {has}")
    for section, keys in now.items():
        if section == "algorithm" and not algorithm:
            continue
        for key in sorted(keys.keys() | before[section].keys()):
            old, new = before[section].get(key), keys.get(key)
            if old != new and key not in _FREE.get(section, ()):
                raise ValueError(f"cannot go on with {folder}: {key} in [{section}] was {old!r} and is now {new!r}")
    rounds, private = before["run"]["rounds"], config.privacy
    if private is not None and private.noise_multiplier is None and rounds != config.run.rounds:
        raise ValueError(
            f"cannot go on with {folder}: its noise was found for {rounds} rounds, and rounds is {config.run.rounds}"
        )
    done = len(read(folder / RECORDS))
    if algorithm and done > config.run.rounds:
        raise ValueError(f"cannot go on with {folder}: it has {done} rounds already, and rounds is {config.run.rounds}")


def compare(
    experiment: Experiment,
    algorithms: Sequence[configs.Call],
    folder: Path,
    resume: bool = False,
    progress: bool | None = None,
) -> list[Row]:
    """Run each algorithm into folder/NAME, and write the rows of all to folder/results.json after each."""
    experiments = [replace(experiment, config=replace(experiment.config, algorithm=call)) for call in algorithms]
    ready = [planned(e, Objective(e.model, e.loss)) for e in experiments]
    for path in sorted(folder.glob(f"*/{TOML}")):
        for e in experiments:
            if holds_run(path.parent):
                check_same(path.parent, e.config, algorithm=path.parent.name == e.config.algorithm.name)
    rows = read_rows(folder)
    for e, algorithm in zip(experiments, ready, strict=True):
        place = folder / e.config.algorithm.name
        done = read_rows(place)
        finished = bool(done) and (done[0]["rounds"] == e.config.run.rounds or _spent(algorithm, place, e.config))
        rows = _replaced(rows, done[0] if finished else execute(e, place, resume, progress))
        if leads():
            write_json(folder / RESULTS, rows)
    return rows


def _spent(algorithm: Algorithm, folder: Path, config: Config) -> bool:
    """Has the run used up its bytes, or its privacy?"""
    history, budget, privacy = read(folder / RECORDS), algorithm.budget, algorithm.privacy
    if privacy is not None and privacy.spent(len(history)):
        return True
    return budget is not None and budget.spent(history, config.run.cohort)


def _replaced(rows: Iterable[Row], row: Row) -> list[Row]:
    """The rows with `row` in the place of the one of its algorithm, or at the end."""
    by_name = {r["algorithm"]: r for r in rows} | {row["algorithm"]: row}
    return list(by_name.values())
