r"""FOLA: clients' posteriors are diagonal Gaussians, and the server multiplies them.

    E-step     log p(phi | eta) = -(pull / 2) sum_j A_j (phi_j - w_j)^2       per example; inference.Laplace
               A_s = (t A + squares_s) / (t + 1)             squares_s: of the round's gradients
    q_s        N(phi_s, 1 / A_s)
    M-step     w = sum_s A_s phi_s / sum_s A_s               the mode of prod_s q_s
               A = mean_s A_s,    t = t + 1

One log_prob serves both: T = (A, A phi, A phi^2) with a client's own A_s on the server, and with the server's A in the
E-step. Its scale does not move the M-step. All with weights N_s: the paper's alpha_s.

    paper        code             shape                     paper    code        shape
    mu           eta.mean         as the parameters         c        pull        scalar
    Omega / t    eta.precision    as the parameters: A      t        eta.rounds  scalar, in a dict; 1 at first

Liu et al. 2021, arXiv:2102.01936; the formulas are those of the authors' code. Ours: it adds 1e-5 to the denominator of
w, which pulls entries of small Omega to 0; here Omega starts at `floor`, and such entries become plain means. What
travels is Omega / t, which does not grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Params, Stats


@dataclass(frozen=True)
class OnlineLaplace:
    """A Gaussian with a precision for every parameter, learned on the way. Its E-step is inference.Laplace.

    Attributes:
        pull: c, how strongly clients are held to the server's weights, for a loss in nats per example; >= 0.
        floor: the first Omega, in nats per example and squared parameter unit; > 0.
    """

    pull: float = 1.0
    floor: float = 1e-5
    uplink = ("a", "a_phi")
    exact = ("precision", "rounds")
    precise = ("a", "a_phi")
    precise_eta = ("precision",)

    class Eta(NamedTuple):
        """The weights, their mean precisions, and the number of rounds (and the start) that those are means over."""

        mean: Params
        precision: Params
        rounds: Params

    def __post_init__(self) -> None:
        if not (0 <= self.pull < math.inf and 0 < self.floor < math.inf):
            raise ValueError(f"need a finite pull >= 0 and floor > 0, got pull={self.pull}, floor={self.floor}")

    def init(self, params: Params) -> Eta:
        """The initial parameters, of which nothing is sure."""
        first = next(iter(params.values()))
        return self.Eta(params, tree.map(lambda v: torch.full_like(v, self.floor), params), {"t": first.new_ones(())})

    def stats(self, q: Any) -> Stats:
        """A, A phi, A phi^2 at the mode."""
        phi, a = q.mean(), q.precision
        first = tree.map(torch.mul, a, phi)
        return Stats({"a": a, "a_phi": first, "a_phi_sq": tree.map(torch.mul, first, phi)})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """-(pull / 2) sum A (phi - w)^2, summed over clients."""

        def square(w: Tensor, a: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return second - 2 * w * first + w**2 * a

        squares = tree.map(square, eta.mean, t["a"], t["a_phi"], t["a_phi_sq"])
        return -0.5 * self.pull * tree.total(squares)

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """The product of Gaussians; w stays where no client says anything."""
        mean = tree.map(
            lambda w, a, first: torch.where(a > 0, first / a.clamp(min=1e-30), w),
            eta.mean,
            t["a"],
            t["a_phi"],
        )
        precision = tree.map(lambda a: a / t.clients, t["a"])
        return self.Eta(mean, precision, tree.map(lambda n: n + 1, eta.rounds))

    def added(self, eta: Eta, squares: Params) -> Params:
        """A client's A_s, from its squares of this round."""
        t = eta.rounds["t"]
        return tree.map(lambda a, s: (t * a + s) / (t + 1), eta.precision, squares)

    def point(self, eta: Eta) -> Params:
        """The mode."""
        return eta.mean
