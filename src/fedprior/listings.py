"""The command line's lists: the named algorithms, and the data sets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from inspect import getdoc
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedprior.algorithms import ALGORITHMS
from fedprior.data import available
from fedprior.values import known_name


def algorithms() -> None:
    """The named algorithms, as prior + inference + server + codec + weighting."""
    table = Table("algorithm", "prior", "inference", "server", "codec", "weighting", "reference")
    for name, make in ALGORITHMS.items():
        a = make()
        parts = [_brief(part) for part in (a.prior, a.inference, a.server, a.codec)]
        if a.downlink is not None:
            parts[-1] += f" up, {_brief(a.downlink)} down"
        table.add_row(name, *parts, a.weighting, (getdoc(make) or "").splitlines()[0].split(": ")[0])
    console().print(table)


def _brief(part: Any) -> str:
    """The part's class, with the fields that are not at their defaults."""
    named = [f for f in fields(part) if f.repr] if is_dataclass(part) else []
    wanted = [f for f in named if f.default != getattr(part, f.name) and f.name not in ("lr", "epochs", "batch_size")]
    return f"{type(part).__name__}({', '.join(f'{f.name}={_brief_value(getattr(part, f.name))}' for f in wanted)})"


def _brief_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {_brief(v)}' for k, v in value.items())}}}"
    return _brief(value) if is_dataclass(value) else str(value)


Name = Annotated[str, typer.Argument(help="Only this one; exit code 1 if it is not here.", show_default="all")]
Silent = Annotated[bool, typer.Option("--quiet", help="No table, only the exit code.")]


def data(name: Name = "", quiet: Silent = False) -> None:
    """The data sets: which are here, where, and how to get the others."""
    sources = available()
    if name:
        known_name("data set", name, [source.name for source in sources])
        sources = [source for source in sources if source.name == name]
    table = Table("data set", "found", "where", "how to get it")
    for source in sources:
        table.add_row(source.name, "yes" if source.found else "no", source.where, source.how)
    if not quiet:
        console().print(table)
    if name and not sources[0].found:
        raise typer.Exit(1)


def console() -> Console:
    """On stdout; wide where it is not a terminal. Without markup: [data] is the name of an extra."""
    return Console(width=None if sys.stdout.isatty() else 180, markup=False)
