"""One self-contained HTML page and PNG plots, from the records of a run or a comparison and nothing else."""

from __future__ import annotations

from pathlib import Path

from fedprior.records import write_atomically
from fedprior.report.page import page
from fedprior.report.plots import plots
from fedprior.report.tracks import Track, read

__all__ = ["Track", "read", "write"]


def write(folder: str | Path) -> Path:
    """Write report.html and its plots into `folder`, from the records in it; the path of the page.

    Equal records give equal bytes.
    """
    folder = Path(folder)
    tracks = read(folder)
    images = plots(tracks)
    for name, png in images.items():
        write_atomically(folder / f"{name}.png", png)
    path = folder / "report.html"
    write_atomically(path, page(tracks, images).encode())
    return path
