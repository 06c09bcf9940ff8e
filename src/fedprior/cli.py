"""The command line: run, compare, report, export here; algorithms and data in listings.py.

What the user can mend is one line on stderr and exit code 2 (refusals.py).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import fedprior
from fedprior import compare as comparing
from fedprior import config as configs
from fedprior import federate, finished, listings
from fedprior.engines import leads
from fedprior.records import read, warning
from fedprior.refusals import interruptible, one_line
from fedprior.rows import Row, cells
from fedprior.run import RECORDS

app = typer.Typer(
    help="Federated learning in which the prior is the algorithm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point; an option that cannot be read is one line and exit code 2, as any other refusal."""
    usage_error: Any = typer.BadParameter.__base__
    try:
        code = app(prog_name="fedprior", standalone_mode=False)
    except usage_error as error:
        typer.echo(f"fedprior: {' '.join(error.format_message().split())}; see fedprior --help", err=True)
        code = 2
    sys.exit(code or 0)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"fedprior {fedprior.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Federated learning in which the prior is the algorithm."""


Config = Annotated[str, typer.Argument(help="A TOML file, or the name of a preset.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/DATE-TIME-NAME")]
Again = Annotated[Path | None, typer.Option(help="Go on with the run in this folder.", show_default="a new run")]
RunEngine = Annotated[
    str | None, typer.Option("--engine", help="How clients are run.", show_default="that of the file, auto")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")]


@app.command()
@one_line
def run(config: Config, out: Out = None, resume: Again = None, engine: RunEngine = None, quiet: Quiet = False) -> None:
    """Run one TOML configuration; `torchrun --nproc-per-node=N -m fedprior run ...` runs it in N processes."""
    if resume is not None and out is not None:
        raise ValueError("--resume DIR writes into DIR: leave out --out")
    path = _find_config(config)
    wanted = configs.read(path)
    if engine is not None:
        wanted = replace(wanted, run=replace(wanted.run, engine=engine))
    experiment = comparing.build(wanted)
    folder = resume or out or _new_folder(path.stem)
    if not leads():  # rank 0 looks after the folder, and prints
        comparing.execute(experiment, folder, resume is not None)
        return
    if resume is not None:
        comparing.check_same(folder, experiment.config)
    elif comparing.holds_comparison(folder):
        raise FileExistsError(f"{folder} holds results already: go on with --resume {folder}, or choose another --out")
    with interruptible(f"fedprior run {folder / comparing.TOML} --resume {folder}"):
        row = comparing.execute(experiment, folder, resume is not None, False if quiet else None)
    if not quiet:
        _print_rows([row])
    _warn(folder, row)
    typer.echo(f"{folder}; plots and tables: fedprior report {folder}")


def _find_config(name: str) -> Path:
    """The file, or the preset of that name."""
    if Path(name).exists() or name.endswith(".toml"):
        return Path(name)
    folder = Path(str(files("fedprior") / "presets"))
    configs.known_name("TOML file or preset", name, sorted(p.stem for p in folder.glob("*.toml")))
    return folder / f"{name}.toml"


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}"


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
Model = Annotated[str, typer.Option(help="lenet, mlp, softmax, char_gru or char_transformer; auto: by data set.")]
Rate = Annotated[float | None, typer.Option(help="Clients' learning rate.", show_default=_OWN)]
Epochs = Annotated[int | None, typer.Option(help="Local epochs.", show_default=_OWN)]
Batch = Annotated[int | None, typer.Option(help="Local batch size.", show_default=_OWN)]
Every = Annotated[int, typer.Option(help="Rounds between evaluations on the test set.")]
Dropout = Annotated[float, typer.Option(help="Probability that a sampled client never answers.")]
Deadline = Annotated[float | None, typer.Option(help="Simulated seconds a round waits.", show_default="for all")]
Engine = Annotated[str, typer.Option(help="How clients are run: auto, sequential, workers or torchrun.")]
Threads = Annotated[int, typer.Option(help="PyTorch's threads while clients train, with --engine sequential.")]
Folder = Annotated[str, typer.Option(help="Where the data set's files are; none: the usual places.")]
Target = Annotated[str, typer.Option(help="Column to predict, of a .csv or .parquet file.")]
Owner = Annotated[str, typer.Option(help="Column that says whose a row is, of a .csv or .parquet file.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the comparison in --out.")]


@app.command()
@one_line
def compare(
    dataset: Dataset,
    algorithms: Algorithms = "auto",
    rounds: Rounds = 100,
    clients: Clients = 100,
    cohort: Cohort = 10,
    partition: Scheme = "auto",
    alpha: Alpha = 1.0,
    holdout: Holdout = 0.0,
    seed: Seed = 0,
    model: Model = "auto",
    lr: Rate = None,
    epochs: Epochs = None,
    batch_size: Batch = None,
    evaluate_every: Every = 1,
    dropout: Dropout = 0.0,
    deadline_seconds: Deadline = None,
    engine: Engine = "auto",
    threads: Threads = 1,
    folder: Folder = "none",
    target: Target = "none",
    client: Owner = "none",
    out: Out = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Run algorithms on the same clients and the same initial model; table, results.json and report.html."""
    given = locals()
    if resume and out is None:
        raise ValueError("--resume needs --out, the folder of the comparison to go on with")
    _compare(
        [_config(given, name) for name in _names(algorithms, dataset)],
        out or _new_folder(Path(dataset).stem),
        resume,
        quiet,
    )


def _names(algorithms: str, dataset: str) -> list[str]:
    if algorithms == "auto":  # a recurrent model has no units that fedsparse could remove
        algorithms = "fedavg,fedprox,fedadam" if dataset == "shakespeare" else "fedavg,fedprox,fedsparse"
    names = [name.strip() for name in algorithms.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"each algorithm can be named once, got {algorithms}")
    return names


def _compare(wanted: list[configs.Config], place: Path, resume: bool, quiet: bool) -> None:
    if not leads():
        experiment = comparing.build(wanted[0])
        comparing.compare(experiment, [c.algorithm for c in wanted], place, resume)
        return
    if not resume and comparing.holds_comparison(place):
        raise FileExistsError(f"{place} holds results already: go on with --resume, or choose another --out")
    with interruptible(f"the same command with --out {place} --resume"):
        experiment = comparing.build(wanted[0])
        rows = comparing.compare(experiment, [c.algorithm for c in wanted], place, resume, False if quiet else None)
        written = _report(place)
    if not quiet:
        _print_rows(rows)
    for row in rows:
        _warn(place / row["algorithm"], row)
    typer.echo(written)


def _warn(folder: Path, row: Row) -> None:
    """A line on stderr if uploads were refused or rounds went by without an update."""
    if text := warning(read(folder / RECORDS)):
        typer.echo(f"fedprior: {row['algorithm']}: {text}", err=True)


def _config(given: dict[str, Any], name: str) -> configs.Config:
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


def _report(folder: Path) -> str:
    """The report, or how to get it: a finished comparison is not refused for want of plots."""
    if find_spec("matplotlib") is None:
        return f"{folder}; for report.html: pip install 'fedprior[report]', then fedprior report {folder}"
    from fedprior import report

    return str(report.write(folder))


@app.command()
@one_line
def report(
    folder: Annotated[Path, typer.Argument(help="A run's or a comparison's folder.", metavar="DIR")],
) -> None:
    """Rebuild report.html and its plots from the records in DIR."""
    from fedprior import report as reporting

    typer.echo(str(reporting.write(folder)))


File = Annotated[Path | None, typer.Option(help="The file to write.", show_default="DIR/slim.FORMAT")]
Format = Annotated[
    str | None, typer.Option(help="safetensors, pt2 or onnx.", show_default="as --out ends, else safetensors")
]


@app.command()
@one_line
def export(
    folder: Annotated[Path, typer.Argument(help="A finished run's folder.", metavar="DIR")],
    format: Format = None,
    out: File = None,
) -> None:
    """Write what is left of a finished run's model to one file, load it again, and compare the outputs."""
    result, config = finished.load(folder)
    about = {name: json.dumps(config.sections()[name]) for name in ("algorithm", "model")}
    typer.echo(str(fedprior.export(result, out or folder / f"slim.{format or 'safetensors'}", format, about)))


app.add_typer(federate.app, name="federate")
app.command()(one_line(listings.algorithms))
app.command()(one_line(listings.data))


def _print_rows(rows: list[Row]) -> None:
    table = Table("algorithm")
    for title in ("accuracy", "nats", "MB up", "MB down", "parameters left", "seconds", "rounds"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*cells(row))
    listings.console().print(table)
