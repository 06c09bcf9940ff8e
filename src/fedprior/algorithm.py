"""An algorithm is one object that knows both sides: prior, inference, server step, codec, weighting.

Optional methods of a prior, each with the meaning it has when absent:

    bind(model, x) -> prior         look at the model before round one        (the prior itself)
    sample(eta, rng) -> eta_s       what one client receives                  (eta, the same payload for all)
    cut(eta) -> Cut or None         what inference.Point trains of the model  (all of it)
    message(eta_s, q) -> Stats      what one client uploads                   (the `uplink` terms of stats(q))
    accept(eta_s, stats) -> Stats   what the server counts of an upload       (all of it)
    project(eta, before) -> eta     back to feasible values, after a step     (eta)
    deploy(eta, objective)          the model that is evaluated and exported  (objective, point(eta))

eta_s is what the client was sent. `message` sees it as it was decoded, `accept` as the server drew it; `accept` raises
a PayloadError to refuse the upload.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fedprior import tree
from fedprior.codecs import Dense
from fedprior.core import Client, Codec, Eta, Inference, Params, Prior, ServerStep, Stats
from fedprior.objective import Objective
from fedprior.server import Exact

Weighting = Literal["uniform", "examples"]


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm.

    Attributes:
        prior: p(phi_s | eta), with the statistics and the M-step that follow from it.
        inference: the E-step.
        server: how far eta moves towards the exact M-step.
        codec: bytes in both directions.
        weighting: "uniform", one vote a client, as the hierarchical model says; or "examples", a client's
            statistics times its number of training examples, as McMahan's FedAvg does.
        name: for tables and records.
    """

    prior: Prior
    inference: Inference
    server: ServerStep = field(default_factory=Exact)
    codec: Codec = field(default_factory=Dense)
    weighting: Weighting = "uniform"
    name: str = "custom"

    def __post_init__(self) -> None:
        for part, protocol in _PARTS.items():
            if isinstance(value := getattr(self, part), type) or not isinstance(value, protocol):
                lacks = [m for m in vars(protocol) if not m.startswith("_") and not hasattr(value, m)]
                why = f"it lacks {', '.join(lacks)}" if lacks else "give an instance, not the class"
                raise TypeError(f"{part}={value!r} is not a {protocol.__name__}: {why}")
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {', '.join(get_args(Weighting))}, got {self.weighting!r}")

    def __str__(self) -> str:
        parts = [self.prior, self.inference, self.server, self.codec]
        text = " + ".join(re.sub(r" at 0x[0-9a-f]+", "", repr(part)) for part in parts)
        return f"{self.name} = {re.sub(r', groups=[^+]*[)]', ')', text)} + {self.weighting} weights"

    def bind(self, model: nn.Module, x: Tensor) -> Algorithm:
        """The algorithm for one model, whose inputs look like x."""
        bind = getattr(self.prior, "bind", None)
        return replace(self, prior=bind(model, x)) if bind else self

    def weight(self, client: Client) -> float:
        """How often a client counts."""
        return float(len(client.train)) if self.weighting == "examples" else 1.0

    @property
    def samples(self) -> bool:
        """Does every client receive an eta of its own?"""
        return hasattr(self.prior, "sample")

    def sample(self, eta: Eta, rng: torch.Generator) -> Eta:
        """What one client receives; eta itself unless the prior draws one for each."""
        sample = getattr(self.prior, "sample", None)
        return sample(eta, rng) if sample else eta

    def message(self, eta: Eta, q: Any) -> Stats:
        """What one client uploads, before its weight."""
        message = getattr(self.prior, "message", None)
        return message(eta, q) if message else self.prior.stats(q).only(self.prior.uplink)

    def accept(self, eta: Eta, stats: Stats) -> Stats:
        """What the server counts of the weighted upload of a client that it had sent eta."""
        accept = getattr(self.prior, "accept", None)
        return accept(eta, stats) if accept else stats

    def start(self, params: Params) -> tuple[Eta, Params]:
        """The first eta and the server step's first state."""
        eta = self.prior.init(params)
        eta = self._project(eta, eta)
        return eta, self.server.init(tree.flatten(eta))

    def m_step(self, eta: Eta, total: Stats, state: Params, exact: frozenset[str] = frozenset()) -> tuple[Eta, Params]:
        """The generalised M-step.

        Args:
            eta: the round's eta.
            total: the sum of the clients' statistics.
            state: the server step's state.
            exact: names (running means, say) that no optimiser may overshoot: they take the exact M-step.
        """
        target = tree.flatten(self.prior.m_step(eta, total))
        flat, state = self.server.step(tree.flatten(eta), target, state)
        flat = {k: target[k] if k.split("/", 1)[1] in exact else v for k, v in flat.items()}
        return self._project(tree.unflatten(eta, flat), eta), state

    def _project(self, eta: Eta, before: Eta) -> Eta:
        project = getattr(self.prior, "project", None)
        return project(eta, before) if project else eta

    def deploy(self, eta: Eta, objective: Objective) -> tuple[Objective, Params]:
        """The model that is evaluated and exported, smaller where the prior has removed units."""
        deploy = getattr(self.prior, "deploy", None)
        return deploy(eta, objective) if deploy else (objective, self.prior.point(eta))


_PARTS = {"prior": Prior, "inference": Inference, "server": ServerStep, "codec": Codec}
