"""The plots: Figure objects on the Agg canvas, without pyplot and its global state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from fedprior.report.tracks import Track, metric_of

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the report's plots need matplotlib: pip install 'fedprior[report]'") from error

# Okabe and Ito's colours, which colour-blind readers tell apart; dashes, where lines lie on each other
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (8, 3)))
_MARKED = 40
_LABELS = {"accuracy": "accuracy", "nats": "negative log-likelihood (nats per example)"}

Points = Callable[[Track], tuple[Sequence[float], Sequence[float]]]


def plots(tracks: list[Track]) -> dict[str, bytes]:
    """Name -> PNG, of all plots for which there are records."""
    metric = metric_of(tracks)
    panels = {}
    if any(t.evaluated(metric)[0] for t in tracks):
        panels["accuracy"] = [_by_round(tracks, metric)]
        panels["accuracy_bytes"] = [_by_bytes(tracks, metric)]
    panels["bytes"] = [_bytes(tracks, "up"), _bytes(tracks, "down")]
    if any(t.row["parameters"] for t in tracks):
        panels["density"] = [_density(tracks)]
    if any(t.spread(metric) for t in tracks):
        panels["clients"] = [_clients(tracks, metric)]
    return {name: _png(draws, len(tracks)) for name, draws in panels.items()}


def _by_round(tracks: list[Track], metric: str) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        _lines(ax, tracks, lambda t: t.evaluated(metric)[:2])
        _integers(ax)
        ax.set_ylabel(f"test {_LABELS[metric]}")

    return draw


def _by_bytes(tracks: list[Track], metric: str) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        _lines(ax, tracks, lambda t: (t.evaluated(metric)[2], t.evaluated(metric)[1]))
        ax.set(xscale="log", xlabel="MB sent so far, up and down", ylabel=f"test {_LABELS[metric]}")
        low, high = ax.get_xlim()
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    return draw


def _bytes(tracks: list[Track], way: str) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        _lines(
            ax, tracks, lambda t: ([r.number for r in t.rounds], [getattr(r, f"bytes_{way}") / 1e6 for r in t.rounds])
        )
        _integers(ax)
        _from_zero(ax)
        ax.set_ylabel(f"MB {way} per round, all clients")

    return draw


def _density(tracks: list[Track]) -> Callable[[Axes], None]:
    def points(t: Track) -> tuple[list[float], list[float]]:
        total = t.row["parameters"]
        return [r.number for r in t.rounds if total], [r.parameters_left / total for r in t.rounds if total]

    def draw(ax: Axes) -> None:
        _lines(ax, tracks, points)
        _integers(ax)
        _from_zero(ax, 1.05)
        ax.set_ylabel("parameters left / parameters")

    return draw


def _clients(tracks: list[Track], metric: str) -> Callable[[Axes], None]:
    def points(t: Track) -> tuple[list[float], list[float]]:
        values = t.spread(metric)
        return [100 * (i + 0.5) / len(values) for i in range(len(values))], values

    def draw(ax: Axes) -> None:
        _lines(ax, tracks, points)
        ax.set(xlabel="clients, from the lowest to the highest (%)", ylabel=f"{_LABELS[metric]} of a client")
        ax.set_xlim(0, 100)
        _from_zero(ax, 1.02 if metric == "accuracy" else None)

    return draw


def _lines(ax: Axes, tracks: list[Track], points: Points) -> None:
    """A line a run; its colour and dashes are the same in all plots."""
    for i, track in enumerate(tracks):
        x, y = points(track)
        ax.plot(
            x,
            y,
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_DASHES[i % len(_DASHES)],
            linewidth=1.8,
            marker="o" if len(x) <= _MARKED else "",
            markersize=3.5,
            label=track.name.replace("$", r"\$"),
        )


def _from_zero(ax: Axes, top: float | None = None) -> None:
    highest = 1.08 * ax.dataLim.y1 if top is None else top
    ax.set_ylim(0, highest if 0 < highest < float("inf") else 1)


def _integers(ax: Axes) -> None:
    ax.set_xlabel("round")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _png(draws: Sequence[Callable[[Axes], None]], lines: int) -> bytes:
    """Panels side by side with one legend above them."""
    figure = Figure(figsize=(6.4 * len(draws) ** 0.7, 4.0), dpi=120, layout="constrained")
    for i, draw in enumerate(draws):
        ax = figure.add_subplot(1, len(draws), i + 1)
        draw(ax)
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=min(lines, 4 * len(draws)), frameon=False, handlelength=3.2
    )
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
