r"""A generator of rules as the prior: clients draw their rules from it, and it learns what they use.

    z_sc ~ p(z | theta_c):   the literals of z are `length` draws from theta_c, in any order
    p(z | theta_c) = h(z) prod_{l in z} theta_cl            h(z) = length! / prod_l (how often l is in z)!

    E_q[log p(z | theta)] = sum_cl n_cl log theta_cl + const,   n_cl = E_q[how often l is in z_c]
    log_hyper = smooth length sum_c (mean_l log theta_cl)       Dirichlet, worth `smooth` clients

    T = n                              expected literal counts, (classes, literals): all that travels
    M-step   theta_cl = (sum_s n_scl + smooth length / literals) / (length (sum_s 1 + smooth))

q_s, over the bodies of the model's rules (models.Rules), is phi's entry `rule`: E_q[phi] = q. The M-step minimises
sum_s KL(q_s || p(. | theta)). The normalisation of theta is in both lines as a multiplier, which is 0 at the maximum. A
literal that is found in several clients' rules makes rules likely that no client has yet.

    paper                     code          shape
    rule generator p(z)       eta.theta     {"rule": (classes, literals)}

Xing, Lu, Yu 2024, arXiv:2308.15324 (FedNSL). In the paper, by its abstract and summaries [V]: rules are latent, their
distribution is what clients and server exchange, the server's prior is a generator. Recalled [R]: the generator is a
transformer over paths of a knowledge graph. Unknown to us [?]: its losses and data. Ours: the multinomial, whose M-step
has a closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedprior import tree
from fedprior.core import Params, Stats

_LEAST = 1e-9


@dataclass(frozen=True)
class Rules:
    """Multinomials over literals, one for each class; a part of a Split, as a rule.

    Attributes:
        smooth: what the hyper-prior is worth, in clients; > 0.
        bodies: literals of each body, (bodies, length) int64; of the model, None until `bind`.
    """

    smooth: float = 1.0
    bodies: Tensor | None = field(default=None, repr=False, compare=False)
    uplink = ("literals",)
    exact = ("theta",)
    needs = 'priors.Rules needs a model of rules: fedprior.models.rules(...), in a TOML file [model] name = "rules"'

    class Eta(NamedTuple):
        """How likely each literal is."""

        theta: Params

    def __post_init__(self) -> None:
        if not 0 < self.smooth < math.inf:
            raise ValueError(f"smooth must be finite and > 0, got {self.smooth}")

    def bind(self, model: nn.Module, x: Tensor) -> Rules:
        """The bodies of the model's rules."""
        bodies = getattr(model, "bodies", None)
        if not isinstance(bodies, Tensor):
            raise ValueError(f"{type(model).__name__} has no bodies. {self.needs}")
        return replace(self, bodies=bodies)

    def init(self, params: Params) -> Eta:
        """All literals are equally likely."""
        count = int(self._bodies.max()) + 1
        return self.Eta({k: v.new_full((len(v), count), 1 / count) for k, v in params.items()})

    def stats(self, q: Any) -> Stats:
        """Expected counts of literals."""

        def counts(rule: Tensor) -> Tensor:
            zeros = rule.new_zeros(len(rule), int(self._bodies.max()) + 1)
            return sum((zeros.index_add(1, column, rule) for column in self._bodies.to(rule.device).T), zeros)

        return Stats({"literals": tree.map(counts, q.mean())})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """E_q[log p(z | theta)]."""
        logs = tree.total(tree.map(torch.xlogy, t["literals"], eta.theta))
        return logs - t.clients * self._bodies.shape[1] * self._excess(eta)

    def log_hyper(self, eta: Eta, before: Eta) -> Tensor:
        """Dirichlet: no literal becomes impossible."""
        logs = tree.total(tree.map(lambda v: v.log().mean(1), eta.theta))
        return self.smooth * self._bodies.shape[1] * (logs - self._excess(eta))

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Relative counts."""
        length = self._bodies.shape[1]

        def share(counts: Tensor) -> Tensor:
            return (counts + self.smooth * length / counts.shape[1]) / (length * (t.clients + self.smooth))

        return self.Eta(tree.map(share, t["literals"]))

    def point(self, eta: Eta) -> Params:
        """p(z | theta_c), (classes, bodies)."""
        bodies = self._bodies
        again = (bodies[:, :, None] == bodies[:, None, :]).tril().sum(2)  # 1, 2, ... of a literal that is there again
        orders = math.factorial(bodies.shape[1]) / again.prod(1)
        return {k: orders.to(v) * v[:, bodies.to(v.device)].prod(2) for k, v in eta.theta.items()}

    def project(self, eta: Eta, before: Eta) -> Eta:
        """Probabilities, whatever noise there was in the sums."""
        positive = tree.map(lambda v: v.clamp(min=_LEAST), eta.theta)
        return self.Eta(tree.map(lambda v: v / v.sum(1, keepdim=True), positive))

    @property
    def _bodies(self) -> Tensor:
        if self.bodies is None:
            raise ValueError("priors.Rules has no rules yet: call bind(model, x), as fedprior.run does")
        return self.bodies

    def _excess(self, eta: Eta) -> Tensor:
        """sum_c (sum_l theta_cl - 1)."""
        return tree.total({k: v.sum(1) - 1 for k, v in eta.theta.items()})
