"""What a run's configuration may change, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What `flwr run --run-config` may change, under these names.

    Attributes:
        rounds: of the run.
        clients: of the federation; client i lives on the node of partition i % nodes.
        cohort: clients sampled a round; 0 for all.
        nodes: SuperNodes, each with a partition of its own.
        seed: all randomness of the run derives from it.
        seconds: that a round waits for its nodes.
        out: folder of records, checkpoints and the model on the server; {run} is Flower's number of the run.
        resume: go on with the run in `out`.
    """

    rounds: int = 10
    clients: int = 3
    cohort: int = 0
    nodes: int = 3
    seed: int = 0
    seconds: float = 600.0
    out: str = "~/fedprior-runs/{run}"
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "clients", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.cohort <= self.clients:
            raise ValueError(f"cohort must be between 0 (all) and the {self.clients} clients, got {self.cohort}")
        if self.clients < self.nodes:
            raise ValueError(f"{self.nodes} nodes share {self.clients} clients: a node would have none")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")

    def changed(self, run_config: Mapping[str, Any]) -> Settings:
        """With the values of a run's configuration; keys that are not here are the job's own."""
        values: dict[str, Any] = {}
        for f in fields(self):
            if f.name in run_config:
                value, kind = run_config[f.name], type(getattr(self, f.name))
                value = float(value) if kind is float and type(value) is int else value
                if type(value) is not kind:
                    raise ValueError(f"{f.name} must be of type {kind.__name__}, got {value!r}")
                values[f.name] = value
        return replace(self, **values)
