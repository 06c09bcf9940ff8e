"""Engines: how a round's clients are run."""

from fedprior.engines.sequential import Sequential

__all__ = ["Sequential"]
