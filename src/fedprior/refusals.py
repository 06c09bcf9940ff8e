"""What the user can mend is one line on stderr and exit code 2; anything else is a bug and keeps its traceback."""

from __future__ import annotations

import dis
import functools
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from fedprior.engines import RankError, launched, leads
from fedprior.privacy import NoiseWarning

_PACKAGE = Path(__file__).parent


def one_line(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose refusals are one line and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with _warnings_as_lines():
                command(*args, **kwargs)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            if not _is_refusal(error):
                raise
            who = "fedprior" if leads() else f"fedprior, rank {os.environ['RANK']}"
            typer.echo(f"{who}: {_text(error)}", err=True)
            raise typer.Exit(2) from error
        except RankError as error:
            if not leads() and str(error).startswith("rank 0 "):  # else rank 0 has told it, with how to go on
                typer.echo(f"fedprior, rank {os.environ['RANK']}: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            if leads():
                typer.echo("fedprior: stopped", err=True)
            raise typer.Exit(130) from error

    return wrapped


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings of fedprior's own are one line on stderr, once."""
    show, told = warnings.showwarning, set[str]()

    def line(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if not issubclass(category, NoiseWarning):
            show(message, category, *place, **more)
        elif leads() and str(message) not in told:
            told.add(str(message))
            typer.echo(f"fedprior: {message}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", NoiseWarning)
        warnings.showwarning = line
        yield


@contextmanager
def interruptible(how: str) -> Iterator[None]:
    """Ctrl-C is one line that says how to go on, and exit code 130; a rank that failed is another, and exit code 1."""
    if launched():  # so torchrun ends the ranks that are left
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except RankError as error:
        typer.echo(f"fedprior: {error}\nto go on, below torchrun or without it: {how}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo(f"fedprior: stopped; to go on: {how}", err=True)
        raise typer.Exit(130) from error


def _is_refusal(error: Exception) -> bool:
    """Did a `raise` of fedprior's own make it? Not one with a note, which is from a client's E-step."""
    if isinstance(error, OSError):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or getattr(error, "__notes__", []):
        return False
    code = last.tb_frame.f_code
    # a ValueError of the interpreter's, such as an unpacking that failed, comes from another instruction
    raised = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and _PACKAGE in Path(code.co_filename).parents


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
