"""The command line: run, compare, report, export here; algorithms and data in listings.py.

What the user can mend is one line on stderr and exit code 2 (refusals.py).
"""

from __future__ import annotations

import json
import sys
import time
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import fedprior
from fedprior import compare as comparing
from fedprior import config as configs
from fedprior import federate, finished, listings, options, personalised
from fedprior.engines import leads
from fedprior.privacy import Privacy
from fedprior.progress import doing
from fedprior.records import read, warning
from fedprior.refusals import interruptible, one_line
from fedprior.rows import Row, cells
from fedprior.run import RECORDS
from fedprior.values import known_name

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
        typer.echo(f"fedprior: {' '.join(error.format_message().split())}; see {_path(error)} --help", err=True)
        code = 2
    sys.exit(code or 0)


def _path(error: Any) -> str:
    """The command that an option was meant for."""
    return error.ctx.command_path if error.ctx is not None else "fedprior"


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


@app.command()
@one_line
def run(
    config: options.Config,
    out: options.Out = None,
    resume: options.Again = None,
    rounds: options.RunRounds = None,
    engine: options.RunEngine = None,
    weighting: options.Weighting = None,
    secure: options.Secure = False,
    target_epsilon: options.Epsilon = None,
    noise_multiplier: options.Noise = None,
    delta: options.Delta = None,
    clip: options.Clip = None,
    robust: options.Rule = None,
    quiet: options.Quiet = False,
) -> None:
    """Run one TOML configuration; `torchrun --nproc-per-node=N -m fedprior run ...` runs it in N processes."""
    if resume is not None and out is not None:
        raise ValueError("--resume DIR writes into DIR: leave out --out")
    path = _find_config(config)
    wanted = configs.changed(configs.read(path), options.sections(locals()))
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
        _print_personalised({folder: wanted}, f"holdout = {personalised.HOLDOUT} in [data]")
        if wanted.privacy is not None:
            _tell_privacy(folder, wanted.privacy)
    _warn(folder, row)
    typer.echo(f"{folder}; plots and tables: fedprior report {folder}")


def _find_config(name: str) -> Path:
    """The file, or the preset of that name."""
    if Path(name).exists() or name.endswith(".toml"):
        return Path(name)
    folder = Path(str(files("fedprior") / "presets"))
    known_name("TOML file or preset", name, sorted(p.stem for p in folder.glob("*.toml")))
    return folder / f"{name}.toml"


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}"


@app.command()
@one_line
def compare(
    dataset: options.Dataset,
    algorithms: options.Algorithms = "auto",
    rounds: options.Rounds = 100,
    clients: options.Clients = 100,
    cohort: options.Cohort = 10,
    partition: options.Scheme = "auto",
    alpha: options.Alpha = 1.0,
    holdout: options.Holdout = 0.0,
    seed: options.Seed = 0,
    model: options.Model = "auto",
    lr: options.Rate = None,
    epochs: options.Epochs = None,
    batch_size: options.Batch = None,
    evaluate_every: options.Every = 1,
    dropout: options.Dropout = 0.0,
    deadline_seconds: options.Deadline = None,
    engine: options.Engine = "auto",
    threads: options.Threads = 1,
    folder: options.Folder = "none",
    target: options.Target = "none",
    client: options.Owner = "none",
    out: options.Out = None,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """Run algorithms on the same clients and the same initial model; table, results.json and report.html."""
    given = locals()
    if resume and out is None:
        raise ValueError("--resume needs --out, the folder of the comparison to go on with")
    _compare(
        [options.config(given, name) for name in _names(algorithms, dataset)],
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
        _print_personalised({place / c.algorithm.name: c for c in wanted}, f"--holdout {personalised.HOLDOUT}")
    for row in rows:
        _warn(place / row["algorithm"], row)
    typer.echo(written)


def _warn(folder: Path, row: Row) -> None:
    """A line on stderr if uploads were refused or rounds went by without an update."""
    if text := warning(read(folder / RECORDS)):
        typer.echo(f"fedprior: {row['algorithm']}: {text}", err=True)


def _tell_privacy(folder: Path, privacy: Privacy) -> None:
    """What has been spent, under the table of a private run."""
    epsilon = read(folder / RECORDS)[-1].layer["epsilon"]
    of = f" of {privacy.target_epsilon:g}" if privacy.target_epsilon is not None else ""
    typer.echo(f"privacy spent: epsilon {epsilon:.3g}{of}, at delta {privacy.delta:g}")


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
    path = out or folder / f"slim.{format or 'safetensors'}"
    with doing(f"writing {path}, and trying it", None):
        result, config = finished.load(folder)
        about = {name: json.dumps(config.sections()[name]) for name in ("algorithm", "model")}
        exported = fedprior.export(result, path, format, about)
    typer.echo(str(exported))


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


def _print_personalised(runs: dict[Path, configs.Config], holdout: str) -> None:
    """Clients before and after they adapt; where they have no held-out examples, how to get them if that can help."""
    found = {path: personalised.read(path) for path in runs}
    rows = [row for some in found.values() for row in some]
    if rows:
        score = personalised.score_of(rows)
        table = Table(title=personalised.TITLE, title_justify="left")
        for i, title in enumerate(personalised.titles(score)):
            table.add_column(title, justify="right" if i > 1 else "left")
        for path, some in found.items():
            for line in personalised.cells(runs[path].algorithm.name, some, score):
                table.add_row(*line)
        listings.console().print(table)
    blind = [
        c.algorithm.name for path, c in runs.items() if not found[path] and personalised.has_own(c.make_algorithm())
    ]
    if blind and personalised.could_hold_out(json.loads((next(iter(runs)) / comparing.CLIENTS).read_text())):
        typer.echo(f"{', '.join(blind)}: {personalised.BLIND}: {holdout}")
