"""The options of `fedprior run` and `fedprior compare`, and the sections of a configuration that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedprior import config as configs

Config = Annotated[str, typer.Argument(help="A TOML file, or the name of a preset.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/DATE-TIME-NAME")]
Again = Annotated[Path | None, typer.Option(help="Go on with the run in this folder.", show_default="a new run")]
RunEngine = Annotated[
    str | None, typer.Option("--engine", help="How clients are run.", show_default="that of the file, auto")
]
RunRounds = Annotated[int | None, typer.Option("--rounds", help="Rounds in all.", show_default="that of the file")]
Weighting = Annotated[
    str | None, typer.Option(help="uniform: a vote a client; or examples.", show_default="that of the file")
]
Secure = Annotated[bool, typer.Option("--secure", help="Secure sums: the server sees no single upload.")]
Epsilon = Annotated[
    float | None,
    typer.Option(help="Differential privacy, spent in all rounds.", show_default="no privacy"),
]
Noise = Annotated[float | None, typer.Option(help="Of differential privacy.", show_default="found from the target")]
Delta = Annotated[
    float | None, typer.Option(help="Of differential privacy, below 1 / clients.", show_default="0.00001")
]
Clip = Annotated[
    float | None, typer.Option(help="Norm of a client's message under differential privacy.", show_default="1")
]
Rule = Annotated[
    str | None, typer.Option(help="A rule instead of the sum: median, trimmed_mean, ...", show_default="the sum")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")]

_OWN = "the algorithm's own"
Dataset = Annotated[str, typer.Argument(help="A data set (see `fedprior data`), or a .csv or .parquet file.")]
Algorithms = Annotated[
    str, typer.Option(help="Names with commas between (see `fedprior algorithms`); auto: three that suit the data set.")
]
Rounds = Annotated[int, typer.Option(help="Rounds of each algorithm.")]
Clients = Annotated[int, typer.Option(help="Clients that share the data; by_key has one for each key.")]
Cohort = Annotated[int, typer.Option(help="Clients sampled each round.")]
Scheme = Annotated[str, typer.Option(help="dirichlet, iid, shards or by_key; auto: by_key if the data have keys.")]
Alpha = Annotated[float, typer.Option(help="Of dirichlet: the smaller, the fewer labels a client has.")]
Holdout = Annotated[float, typer.Option(help="Fraction of each client's examples kept for its evaluation.")]
Seed = Annotated[int, typer.Option(help="All randomness derives from it.")]
Model = Annotated[str, typer.Option(help=f"{', '.join(configs.MODELS)}; auto: by data set.")]
Rate = Annotated[float | None, typer.Option(help="Clients' learning rate.", show_default=_OWN)]
Epochs = Annotated[int | None, typer.Option(help="Local epochs.", show_default=_OWN)]
Batch = Annotated[int | None, typer.Option(help="Local batch size.", show_default=_OWN)]
Every = Annotated[int, typer.Option(help="Rounds between evaluations on the test set.")]
Dropout = Annotated[float, typer.Option(help="Probability that a sampled client never answers.")]
Deadline = Annotated[float | None, typer.Option(help="Simulated seconds a round waits.", show_default="for all")]
Engine = Annotated[str, typer.Option(help="How clients are run: auto, stacked, sequential, workers or torchrun.")]
Threads = Annotated[int, typer.Option(help="PyTorch's threads while clients train, with --engine sequential.")]
Folder = Annotated[str, typer.Option(help="Where the data set's files are; none: the usual places.")]
Target = Annotated[str, typer.Option(help="Column to predict, of a .csv or .parquet file.")]
Owner = Annotated[str, typer.Option(help="Column that says whose a row is, of a .csv or .parquet file.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the comparison in --out.")]


def sections(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of run, as far as they were given, by the sections that they change."""
    where = {
        "run": ["engine", "rounds"],
        "algorithm": ["weighting"],
        "privacy": ["target_epsilon", "noise_multiplier", "delta", "clip"],
    }
    keys = {name: {k: given[k] for k in names if given[k] is not None} for name, names in where.items()}
    keys |= {"secure": {}} if given["secure"] else {}
    keys |= {"robust": {"name": given["robust"]}} if given["robust"] is not None else {}
    return {name: section for name, section in keys.items() if section or name == "secure"}


def config(given: Mapping[str, Any], name: str) -> configs.Config:
    """The options of compare as one algorithm's configuration; base is the current folder."""
    kind = Path(given["dataset"]).suffix[1:]
    table = kind in configs.TABLES
    source = {key: given[key] for key in ("folder", "target", "client", "partition", "clients", "alpha", "holdout")}
    source |= {"name": kind, "path": given["dataset"]} if table else {"name": given["dataset"]}
    own = {key: given[key] for key in ("lr", "epochs", "batch_size") if given[key] is not None}
    sections = {
        "run": {key: given[key] for key in ("rounds", "cohort", "seed", "evaluate_every", "engine", "threads")},
        "data": source,
        "model": {"name": given["model"]},
        "algorithm": {"name": name, **own},
        "availability": {key: given[key] for key in ("dropout", "deadline_seconds")},
    }
    return configs.parse(sections, Path.cwd())
