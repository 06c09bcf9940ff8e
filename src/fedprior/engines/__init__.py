"""Engines: how a round's clients are run."""

from collections.abc import Callable, Mapping

from fedprior.core import Engine
from fedprior.engines.auto import Auto
from fedprior.engines.ranks import RankError, launched, leads
from fedprior.engines.sequential import Sequential
from fedprior.engines.stacked import Stacked
from fedprior.engines.torchrun import TorchRun
from fedprior.engines.workers import WorkerError, Workers

__all__ = [
    "ENGINES",
    "Auto",
    "RankError",
    "Sequential",
    "Stacked",
    "TorchRun",
    "WorkerError",
    "Workers",
    "leads",
    "named",
    "usual",
]

ENGINES: Mapping[str, Callable[[], Engine]] = {
    "auto": lambda: usual(),
    "sequential": Sequential,
    "workers": Workers,
    "stacked": Stacked,
    "torchrun": TorchRun,
}
"""By the names that the command line and [run] have for them."""


def usual() -> Engine:
    """What runs if nothing is said: a rank below torchrun, else Auto."""
    return TorchRun() if launched() else Auto()


def named(name: str, threads: int | None = None, timeout_seconds: float = 1800.0) -> Engine:
    """An engine of ENGINES.

    Args:
        name: its name.
        threads: PyTorch's, for "sequential".
        timeout_seconds: how long ranks wait for each other, for "torchrun".
    """
    if launched() and name not in ("auto", "torchrun"):
        raise ValueError(f'torchrun has started {name!r} more than once: take the engine "auto", or leave out torchrun')
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    engine = ENGINES[name]()
    if isinstance(engine, Sequential):
        return Sequential(threads)
    return TorchRun(timeout_seconds) if isinstance(engine, TorchRun) else engine
