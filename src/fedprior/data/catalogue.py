"""The data sets known by name: `load` one, or list what is `available` here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fedprior.core import Examples
from fedprior.data import digits, fashion_mnist, shakespeare

_SETS = {"fashion-mnist": fashion_mnist, "shakespeare": shakespeare, "digits": digits}


class Source(NamedTuple):
    """One data set: is it on this machine, where, and the command that gets it."""

    name: str
    found: bool
    where: str
    how: str


def load(name: str, folder: str | Path | None = None, **options: Any) -> tuple[Examples, Examples]:
    """Train and test examples of a named data set; FileNotFoundError says how to get a missing one.

    Args:
        name: "fashion-mnist", "shakespeare" or "digits"; each has a module that describes it.
        folder: where its files are; then no other place is looked at.
        options: the set's own, such as `stride=` of shakespeare.
    """
    if name not in _SETS:
        raise ValueError(f"no data set is called {name!r}; the known ones are {', '.join(map(repr, _SETS))}")
    return _SETS[name].load(folder, **options)


def available() -> list[Source]:
    """All known data sets, in a fixed order. Looks for files and reads none."""
    return [_source(name) for name in _SETS]


def _source(name: str) -> Source:
    try:
        return Source(name, True, str(_SETS[name].find()), _SETS[name].HOW)
    except (FileNotFoundError, ModuleNotFoundError):
        return Source(name, False, "", _SETS[name].HOW)
