"""A progress bar with accuracy, bytes and time left, and a line for what comes after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fedprior.records import Round
from fedprior.structure import dense_layers


class Progress:
    """A rich bar on stderr, or nothing.

    Args:
        name: of the algorithm.
        rounds: the total.
        show: None shows it if stderr is a terminal.
        done: the rounds before a resume.
        note: a line to begin with.
    """

    def __init__(self, name: str, rounds: int, show: bool | None, done: Sequence[Round], note: str = "") -> None:
        self._show = sys.stderr.isatty() if show is None else show
        self._name, self._rounds, self._done = name, rounds, len(done)
        self._bytes = sum(r.bytes_up + r.bytes_down for r in done)
        self._bar: Any = None
        self._task: Any = None
        self._told, self._note = "", note

    def __enter__(self) -> Progress:
        if self._show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            text = TextColumn("{task.description}"), TextColumn("{task.fields[seen]}")
            columns = (text[0], BarColumn(), MofNCompleteColumn(), text[1], TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True)).__enter__()
            if self._note:
                self._bar.console.print(f"{self._name}: {self._note}", highlight=False, markup=False)
            self._task = self._bar.add_task(self._name, total=self._rounds, completed=self._done, seen="")
        return self

    def update(self, record: Round, choice: str = "") -> None:
        """One more round; `choice`, what the engine chose and why, is told when it changes."""
        if self._bar is not None and choice and choice != self._told:
            self._bar.console.print(f"{self._name}: {choice}", highlight=False)
            self._told = choice
        self._bytes += record.bytes_up + record.bytes_down
        if self._bar is not None:
            seen = " ".join(f"{k} {v:.4f}" for k, v in record.metrics.items())
            lost = len(record.lost())
            seen += f" {self._bytes / 1e6:.1f} MB" + (f" ({lost} clients lost)" if lost else "")
            self._bar.update(self._task, advance=1, seen=seen.strip())

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


@contextmanager
def doing(text: str, show: bool | None) -> Iterator[None]:
    """A line on stderr with the time that has gone by, as long as the work lasts, or nothing.

    Args:
        text: what is being done.
        show: None shows it if stderr is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield
        return
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(text, total=None)
        yield


def left_whole(model: nn.Module, prior: Any) -> str:
    """The layers of which a prior that is bound to the model removes no unit; nothing for a prior without groups."""
    groups = getattr(prior, "groups", ())
    if not groups:
        return ""
    kinds = {name: type(layer).__name__ for name, layer in model.named_modules()}
    names = [f"{name} ({kinds[name]})" if name else kinds[name] for name in dense_layers(model, groups)]
    return f"layers that stay whole: {', '.join(names) or 'none'}"
