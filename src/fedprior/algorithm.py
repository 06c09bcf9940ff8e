"""An algorithm is one object that knows both sides: prior, inference, server step, codec, weighting.

Optional methods of a prior, each with the meaning it has when absent:

    bind(model, x) -> prior         look at the model before round one        (the prior itself)
    sample(eta, rng) -> eta_s       what one client receives                  (eta, the same payload for all)
    cut(eta) -> Cut                 the units that are left of the model      (all of them)
    left(eta) -> Params             the parameters that are left              (those of point(eta) that cut(eta) leaves)
    whole(eta, params) -> Params    those of a client, as of the full model   (params)
    message(eta_s, q) -> Stats      what one client uploads                   (the `uplink` terms of stats(q))
    reference(eta_s, sent) -> Stats what deltas are taken from: see below     (the message of inference.start)
    accept(eta_s, stats) -> Stats   what the server counts of an upload       (all of it)
    project(eta, before) -> eta     back to feasible values, after a step     (eta)
    idle(eta) -> eta                a round from which nothing arrived        (eta)
    full(eta) -> q                  whose message is as long as any can be    (unknown: budget.py)
    kept(q) -> Params               what a client keeps and never sends       (nothing)
    recall(kept) -> prior           the prior as that client sees it later    (asked only where there is `kept`)
    predictive(eta, rng) -> Predictive    what the server predicts with       (prior.point(eta))
    log_hyper(eta, before) -> scalar log p(eta), which m_step counts in       (0)

A prior whose eta shrinks with the model has an attribute `index`: the fields of eta, of fixed shapes, that say which
shapes the others have. They go first in a broadcast, and the prior has two more methods:

    sized(like, index) -> eta       without values, in the shapes that these fields (flat) ask for
    follow(before, after, state)    the server step's state, after a step in which eta has shrunk

Optional attributes: `exact`, a tuple of eta's fields that take the exact M-step whatever the server step is, before
`project`: gates, counters and running means, which no optimiser may overshoot. Absent, there are none. `individual`:
True if `accept` does more than to refuse, so that the server needs uploads one by one; absent, False, unless there is
a `sample`. Sums that hide the uploads (secure, privacy) and robust rules do not call `accept` on single ones. `bounds`:
term -> the largest change of an entry of it, under secure sums; absent, 4 for all (privacy/secure_sum.py). `precise`
and `precise_eta`: terms, and fields of eta, of which a codec may set no entry to zero (codecs/fit.py).

An optional method of an inference, with what it means when absent:

    personal(objective, prior, eta, client, state, rng) -> Predictive     what client s predicts with, after it has
        adapted to its training examples; `state` is that of its last E-step, or None for a client never seen
        (one E-step from eta with that state, and the mean of its posterior: fine-tuning)

Personal parameters. What `kept(q)` names lives with the client: in its next E-step, and in `personal`, the inference
is given prior.recall(kept), whose point has the client's own values. An inference needs to know nothing of it.

eta_s is what the client was sent. `message` sees it as it was decoded, `accept` as the server drew it; `accept` raises
a PayloadError to refuse the upload.

Deltas. Every term that `reference` returns is coded as its difference to it, every other term as it is. The reference
may read the terms of `sent` that it does not return, if they are vectors, which every codec of ours carries as
float32; it is linear in `sent`, and stands for as many clients. Absent, all terms are differences to the message of
the posterior where the E-step begins: for FedAvg phi - w.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from fedprior import tree
from fedprior.budget import Budget
from fedprior.codecs import Dense, fit
from fedprior.core import Client, Codec, Eta, Inference, Params, Prior, ServerStep, Stats
from fedprior.objective import Objective
from fedprior.posteriors import Predictive
from fedprior.privacy import dp, secure_sum
from fedprior.privacy.dp import Privacy
from fedprior.privacy.secure_sum import SecureSum
from fedprior.server import Exact

if TYPE_CHECKING:
    from fedprior.robust import Rule

Weighting = Literal["uniform", "examples"]


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm.

    Attributes:
        prior: p(phi_s | eta), with the statistics and the M-step that follow from it.
        inference: the E-step.
        server: how far eta moves towards the exact M-step.
        codec: bytes from the clients to the server.
        downlink: bytes from the server to the clients; None for `codec`.
        delta: code a client's message as the difference to what the server knows before it arrives (wire.py). There
            are no deltas downwards: a client of a sampled cohort holds no recent eta to add them to.
        feedback: clients keep what the codec left out and add it to their next message. Needs delta, and a prior
            whose statistics are means of all clients, and which removes no unit: an entry behind a closed gate cannot
            be sent late.
        weighting: "uniform", one vote a client, as the hierarchical model says; or "examples", a client's
            statistics times its number of training examples, as McMahan's FedAvg does.
        budget: bytes that a run may spend (budget.py); None for no limit.
        secure: the server sees the sum of the uploads alone (privacy/secure_sum.py); None for uploads in the open.
        privacy: clipping, noise and their account (privacy/dp.py); None for none.
        robust: a rule instead of the sum, for clients that are not trusted (robust.py); None for the sum.
        name: for tables and records.
    """

    prior: Prior
    inference: Inference
    server: ServerStep = field(default_factory=Exact)
    codec: Codec = field(default_factory=Dense)
    weighting: Weighting = "uniform"
    downlink: Codec | None = None
    delta: bool = False
    feedback: bool = False
    budget: Budget | None = None
    secure: SecureSum | None = None
    privacy: Privacy | None = None
    robust: Rule | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        parts = _PARTS if self.downlink is None else {**_PARTS, "downlink": Codec}
        for part, protocol in parts.items():
            if isinstance(value := getattr(self, part), type) or not isinstance(value, protocol):
                lacks = [m for m in vars(protocol) if not m.startswith("_") and not hasattr(value, m)]
                why = f"it lacks {', '.join(lacks)}" if lacks else "give an instance, not the class"
                raise TypeError(f"{part}={value!r} is not a {protocol.__name__}: {why}")
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {', '.join(get_args(Weighting))}, got {self.weighting!r}")
        fit.check(self)
        self._check_layer()

    def _check_layer(self) -> None:
        """What hides uploads, what needs them, and what bounds them."""
        if self.robust is not None and (self.secure is not None or self.privacy is not None):
            raise ValueError(
                f"robust={self.robust} compares uploads one by one, and secure=... and privacy=... are of their sum: "
                "leave robust out, or the others"
            )
        if self.secure is not None:
            secure_sum.check(self)
        if self.privacy is not None:
            dp.check(self)
        if self.robust is not None and (self.individual or hasattr(self.prior, "reference") or self.feedback):
            raise ValueError(
                f"robust={self.robust} needs statistics that are means over all clients, sent at once, and those of "
                f"{type(self.prior).__name__} with feedback={self.feedback} are not: leave robust out"
            )

    def __str__(self) -> str:
        parts = [self.prior, self.inference, self.server, self.codec]
        text = " + ".join(re.sub(r" at 0x[0-9a-f]+", "", repr(part)) for part in parts)
        text = f"{self.name} = {re.sub(r', groups=[^+]*[)]', ')', text)} + {self.weighting} weights"
        more = {"downlink": self.downlink, "delta": self.delta, "feedback": self.feedback, "budget": self.budget}
        more |= {"secure": self.secure, "privacy": self.privacy, "robust": self.robust}
        return text + "".join(f" + {name}={value}" for name, value in more.items() if value)

    def bind(self, model: nn.Module, x: Tensor) -> Algorithm:
        """The algorithm for one model, whose inputs look like x."""
        bind = getattr(self.prior, "bind", None)
        return replace(self, prior=bind(model, x)) if bind else self

    def weight(self, examples: int) -> float:
        """How often a client with so many training examples counts."""
        return float(examples) if self.weighting == "examples" else 1.0

    @property
    def samples(self) -> bool:
        """Does every client receive an eta of its own?"""
        return hasattr(self.prior, "sample")

    @property
    def layered(self) -> bool:
        """Does something stand between the uploads and their sum (layer.py)?"""
        return not (self.secure is None and self.privacy is None and self.robust is None)

    @property
    def poisson(self) -> bool:
        """Is each client sampled by itself, so that cohorts have no fixed size?"""
        return self.privacy is not None and self.privacy.sampling == "poisson"

    @property
    def individual(self) -> bool:
        """Must the server see uploads one by one?"""
        return self.samples or getattr(self.prior, "individual", False)

    def sample(self, eta: Eta, rng: torch.Generator) -> Eta:
        """What one client receives; eta itself unless the prior draws one for each."""
        sample = getattr(self.prior, "sample", None)
        return sample(eta, rng) if sample else eta

    def seen_by(self, kept: Params | None) -> Prior:
        """The prior as a client with these parameters of its own sees it; None for a client never seen."""
        recall: Any = getattr(self.prior, "recall", None)
        return recall(kept) if recall and kept else self.prior

    def e_step(
        self,
        objective: Objective,
        eta: Eta,
        client: Client,
        own: Params | None,
        kept: Params | None,
        rng: torch.Generator,
    ) -> tuple[Any, Params | None, Params | None]:
        """The client's posterior, and its next state: the inference's `own`, and the prior's `kept`."""
        prior = self.seen_by(kept)
        q, own = self.inference.e_step(objective, prior, eta, client, own, rng)
        keeps: Any = getattr(prior, "kept", None)
        return q, own, keeps(q) if keeps else None

    def personal(
        self,
        objective: Objective,
        eta: Eta,
        client: Client,
        own: Params | None,
        kept: Params | None,
        rng: torch.Generator,
    ) -> Predictive:
        """What a client predicts with, given eta and the state that its last E-step left."""
        prior = self.seen_by(kept)
        personal: Any = getattr(self.inference, "personal", None)
        if personal is not None:
            return personal(objective, prior, eta, client, own, rng)
        q, _ = self.inference.e_step(objective, prior, eta, client, own, rng)
        return Predictive.point(self.whole(eta, q.mean()))

    def whole(self, eta: Eta, params: Params) -> Params:
        """A client's parameters as those of the full model."""
        whole = getattr(self.prior, "whole", None)
        return whole(eta, params) if whole else params

    def message(self, eta: Eta, q: Any) -> Stats:
        """What one client uploads, before its weight."""
        message = getattr(self.prior, "message", None)
        return message(eta, q) if message else self.prior.stats(q).only(self.prior.uplink)

    def reference(self, eta: Eta, sent: Stats) -> Stats:
        """What is known of a message before any data were seen, in units of `sent.clients`."""
        reference = getattr(self.prior, "reference", None)
        if reference:
            return reference(eta, sent)
        return self.message(eta, self.inference.start(self.prior, eta)).weighted(sent.clients)

    def accept(self, eta: Eta, stats: Stats) -> Stats:
        """What the server counts of the weighted upload of a client that it had sent eta."""
        accept = getattr(self.prior, "accept", None)
        return accept(eta, stats) if accept else stats

    def start(self, params: Params) -> tuple[Eta, Params]:
        """The first eta and the server step's first state."""
        eta = self.prior.init(params)
        eta = self._project(eta, eta)
        return eta, self.server.init(tree.flatten(eta)) | (self.privacy.init() if self.privacy else {})

    def m_step(self, eta: Eta, total: Stats, state: Params, exact: frozenset[str] = frozenset()) -> tuple[Eta, Params]:
        """The generalised M-step.

        Args:
            eta: the round's eta.
            total: the sum of the clients' statistics.
            state: the server step's state.
            exact: names (of running means, say) that take the exact M-step, as do the fields in the prior's `exact`.
        """
        target = tree.flatten(self.prior.m_step(eta, total))
        own = {k: state[k] for k in (self.privacy.init() if self.privacy else {})}
        flat, state = self.server.step(tree.flatten(eta), target, {k: v for k, v in state.items() if k not in own})
        state = state | (self.privacy.step(own, total) if self.privacy else {})
        fields = getattr(self.prior, "exact", ())
        whole = {k for k in flat if k.split("/", 1)[0] in fields or k.split("/", 1)[1] in exact}
        flat = {k: target[k] if k in whole else v for k, v in flat.items()}
        return self._followed(eta, self._project(tree.unflatten(eta, flat), eta), state)

    def idle(self, eta: Eta, state: Params) -> tuple[Eta, Params]:
        """What a round from which nothing arrived leaves of eta and of the server step's state."""
        idle = getattr(self.prior, "idle", None)
        return self._followed(eta, idle(eta) if idle else eta, state)

    def _followed(self, before: Eta, after: Eta, state: Params) -> tuple[Eta, Params]:
        follow = getattr(self.prior, "follow", None)
        return after, follow(before, after, state) if follow else state

    def _project(self, eta: Eta, before: Eta) -> Eta:
        project = getattr(self.prior, "project", None)
        return project(eta, before) if project else eta

    def deploy(self, eta: Eta, objective: Objective) -> tuple[Objective, Params]:
        """The model that is evaluated and exported, smaller where the prior has removed units."""
        cut = getattr(self.prior, "cut", None)
        if cut is None:
            return objective, self.prior.point(eta)
        units, left = cut(eta), getattr(self.prior, "left", None)
        return objective.cut(units), left(eta) if left else units.gather(self.prior.point(eta))

    def predictive(self, eta: Eta, objective: Objective, rng: torch.Generator) -> tuple[Objective, Predictive]:
        """What the server predicts with: `deploy`'s model, unless the prior has a predictive of its own."""
        predictive = getattr(self.prior, "predictive", None)
        if predictive is not None:
            return objective, predictive(eta, rng)
        deployed, params = self.deploy(eta, objective)
        return deployed, Predictive.point(params)


_PARTS = {"prior": Prior, "inference": Inference, "server": ServerStep, "codec": Codec}
