"""Tables and plots of what pareto.py has run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(out: Path) -> None:
    """One Markdown table a setting, and the plots, in the folder of the runs."""
    rows: list[Row] = [row for path in sorted(out.glob("*.json")) for row in json.loads(path.read_text())]
    if not rows:
        raise SystemExit(f"{out} has no finished run: python benchmarks/pareto.py run --out {out}")
    text = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = grouped([row for row in rows if row["setting"] == setting])
        text += [f"## {setting}", "", *table(mine), ""]
        plot(mine, out / f"{setting}.png")
    (out / "tables.md").write_text("\n".join(text))
    print("\n".join(text))


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Name -> its seeds, best accuracy for the bytes first."""
    names: dict[str, list[Row]] = {}
    for row in rows:
        names.setdefault(row["name"], []).append(row)
    return dict(sorted(names.items(), key=lambda item: -mean(item[1], "mb")))


def mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def table(names: dict[str, list[Row]]) -> list[str]:
    """Mean and, in brackets, the spread (largest minus smallest) over seeds."""
    lines = [
        "| run | seeds | accuracy, last round | mean of last five evaluations | MB | fewer bytes | parameters left |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = names.get("fedavg")
    for name, rows in names.items():
        fewer = f"{mean(dense, 'mb') / mean(rows, 'mb'):.1f}x" if dense else ""
        cells = [name, str(len(rows)), percent(rows, "accuracy"), percent(rows, "tail")]
        cells += [f"{mean(rows, 'mb'):,.1f}", fewer, f"{mean(rows, 'parameters'):,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def percent(rows: Sequence[Row], key: str) -> str:
    values = [100 * row[key] for row in rows]
    return f"{statistics.fmean(values):.2f} ({max(values) - min(values):.2f})"


def plot(names: dict[str, list[Row]], path: Path) -> None:
    """Accuracy against bytes as they are spent, and against the parameters that are left; one colour a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    colours = pyplot.get_cmap("tab20").colors
    for i, (name, rows) in enumerate(names.items()):
        style = {"color": colours[i % 20], "label": name}
        bold = 2.5 if name.startswith("fedsparse") else 1.2
        curves = [row["curve"] for row in rows]
        if all(curves):
            points = list(zip(*curves, strict=True))
            mb = [statistics.fmean(p[1] for p in point) for point in points]
            accuracy = [statistics.fmean(p[2] for p in point) for point in points]
            left.plot(mb, [100 * a for a in accuracy], linewidth=bold, **style)
        else:
            left.plot(mean(rows, "mb"), 100 * mean(rows, "tail"), "x", **style)
        right.plot(mean(rows, "parameters"), 100 * mean(rows, "tail"), "o", markersize=4 * bold, **style)
    best = max(100 * mean(rows, "tail") for rows in names.values())
    left.set(
        xscale="log", xlabel="MB, both directions, all clients", ylabel="test accuracy, %", ylim=(best - 20, best + 1)
    )
    right.set(xscale="log", xlabel="parameters left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
