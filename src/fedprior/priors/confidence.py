r"""pFedVEM: clients have heads of their own around the server's, and those who stay near it count for more.

    phi_s ~ N(mu, rho_s^2 I)       a client's head, d entries; rho_s is a parameter of the client's own
    psi                            the base, everything else: the same for all clients, without a prior

    log_prob = -1/2 E|phi_s - mu|^2 / rho_s^2 - d log rho_s
    E-step   rho_s^2 = E|phi_s - mu|^2 / d, the maximum over rho_s    (`confidence`; inference/confidence.py)
    M-step   mu = sum_s c_s E[phi_s] / sum_s c_s,    psi = sum_s psi_s / sum_s 1
    T = (c, c phi, c phi^2, log c, psi)              c_s = rho_0^2 / rho_s^2

rho_s reads mu, and statistics see no eta: so the E-step finds it, and the posterior carries it. c_s is 1 for a client
never seen: the M-step is a ratio, and rho_0 sets the unit of what travels.

    paper      code                    shape                    paper    code                 shape
    mu, psi    eta.mean                as the parameters        c        q.confidence["c"]    scalar
    sigma_s    q.var ** 0.5            as the head              rho_0    rho                  scalar

Zhu, Ma, Blaschko 2023, arXiv:2305.12557 (pFedVEM). The model, rho_s and mu are those of the paper's code. Ours: a
client's weight is the same in mu and psi, where the code weighs psi alone, by examples; rho_0, and the unit of c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from fedprior import tree
from fedprior.core import Params, Stats
from fedprior.priors.parts import globs, take


@dataclass(frozen=True)
class Confidence:
    """A Gaussian around the server's head, as wide as each client finds it. Its E-step is inference.Confidence.

    Attributes:
        rho: of a client never seen, in parameter units; > 0. An E-step by SGD needs lr / (rho_s^2 N_s) < 2.
        head: a glob, or "@head" for the last layer (priors.Split).
        names: the parameters that it names; empty until `bind`.
    """

    rho: float = 0.3
    head: str = "@head"
    names: tuple[str, ...] = field(default=(), repr=False)
    uplink = ("conf", "conf_phi", "psi")

    class Eta(NamedTuple):
        """mu in the head, psi in the base."""

        mean: Params

    def __post_init__(self) -> None:
        if not 0 < self.rho < math.inf:
            raise ValueError(f"need a finite rho > 0, got {self.rho}")

    def bind(self, model: nn.Module, x: Tensor) -> Confidence:
        """The same prior with the names of a model's head."""
        patterns = globs(self.head, model)
        trained = [name for name, value in model.named_parameters() if value.requires_grad]
        names = tuple(name for name in trained if any(fnmatchcase(name, glob) for glob in patterns))
        if not names:
            raise ValueError(f"head={self.head!r} names no trained parameter; the model has {', '.join(trained)}")
        return replace(self, names=names)

    def init(self, params: Params) -> Eta:
        """The initial parameters."""
        return self.Eta(params)

    def stats(self, q: Any) -> Stats:
        """c times the moments of the head, and the base."""
        if not hasattr(q, "var"):
            raise TypeError(
                f"priors.Confidence needs a client's own rho, and {type(q).__name__} has none: use inference.Confidence"
            )
        c = q.confidence["c"]
        first, second = (
            tree.map(lambda v: c * v, take(moment, self.names)) for moment in (q.mean(), q.second_moment())
        )
        psi = {k: v for k, v in q.mean().items() if k not in self.names}
        conf = {"conf": q.confidence, "log_conf": {"c": c.log()}}
        return Stats(conf | {"conf_phi": first, "conf_phi_sq": second, "psi": psi})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """Of the heads, summed over clients."""
        mu, c = take(eta.mean, self.names), t["conf"]["c"]

        def square(mu: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return second - 2 * mu * first + c * mu**2

        squares = tree.total(tree.map(square, mu, t["conf_phi"], t["conf_phi_sq"]))
        return 0.5 * (tree.size(mu) * t["log_conf"]["c"] - squares / self.rho**2)

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Heads by confidence, bases by number."""
        c = t["conf"]["c"]
        return self.Eta({k: t["conf_phi"][k] / c if k in self.names else t["psi"][k] / t.clients for k in eta.mean})

    def point(self, eta: Eta) -> Params:
        """mu and psi."""
        return eta.mean

    def reference(self, eta: Eta, sent: Stats) -> Stats:
        """c mu and psi: the differences are c (m - mu) and psi_s - psi."""
        mu = {k: sent["conf"]["c"] * v for k, v in take(eta.mean, self.names).items()}
        psi = {k: sent.clients * v for k, v in eta.mean.items() if k not in self.names}
        return Stats({"conf_phi": mu, "psi": psi}, sent.clients)

    def confidence(self, eta: Eta, q: Any) -> Params:
        """c at the best rho_s for q."""
        mu = take(eta.mean, self.names)
        scatter = tree.map(lambda mu, m, var: (m - mu) ** 2 + var, mu, take(q.phi, self.names), q.var)
        return {"c": self.rho**2 * tree.size(mu) / tree.total(scatter)}
