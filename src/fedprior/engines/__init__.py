"""Engines: how a round's clients are run."""

from fedprior.engines.auto import Auto
from fedprior.engines.sequential import Sequential
from fedprior.engines.workers import WorkerError, Workers

__all__ = ["Auto", "Sequential", "WorkerError", "Workers"]
