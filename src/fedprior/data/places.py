"""Where data sets are looked for on this machine: nothing is ever downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def cache_folders() -> list[Path]:
    """$FEDPRIOR_DATA if it is set, then fedprior's folder in the user's cache ($XDG_CACHE_HOME)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedprior"
    own = os.environ.get("FEDPRIOR_DATA")
    return [Path(own), cache] if own else [cache]


def first(name: str, how: str, places: list[Path], holds: Callable[[Path], bool]) -> Path:
    """The first place that `holds` the data; else an error that lists them and says `how`."""
    for place in places:
        if holds(place):
            return place
    listed = "".join(f"\n  {place}" for place in places)
    raise FileNotFoundError(
        f"the data set {name!r} (or a part of it) is not in any of these folders:{listed}\n"
        f"Get it with:  {how}\nor name the folder that has it:  load({name!r}, folder=...)"
    )
