r"""SCAFFOLD: no other prior than FedAvg's, but E-steps that are corrected for the drift of local training.

    l_s(phi)    mean loss of client s      c_s ≈ grad l_s(w), kept by the client      c = mean_s c_s, on the server
    E-step      SGD on  l_s(phi) - <c_s - c, phi>  from w: slopes like those of the mean of all clients
                c_s' = c_s - c + (w - phi) / (lr x steps)           the mean of the slopes on the way
    T           (phi, c_s' - c_s, 1 if new);    M-step  w = mean phi,  c = mean c_s over the clients seen so far

The factor exp <c_s - c, phi> is free of w, and the rest of the prior is flat: log_prob says nothing of eta.
At a fixed point phi_s = w for all s, hence c_s = grad l_s(w), sum_s c_s = 0: the optimum of all clients' data.

    paper   code           shape                    paper          code            shape
    x       eta.mean       as the parameters        c_i - c        q.tilt          as the parameters
    c       eta.control    as the parameters        Delta c_i      q.step          as the parameters

Karimireddy et al. 2020, arXiv:1910.06378, Algorithm 1, option II. Ours: c is the mean over the clients seen so far
(priors/running.py) and a new client trains untilted; the paper counts the unseen with c_i = 0 and tilts a new client by
c. With full participation both are the same. Weights by examples weight c as they weight w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Params, Stats
from fedprior.priors.running import joined


@dataclass(frozen=True)
class Scaffold:
    """A flat prior, and control variates. Its E-step is inference.Tilted."""

    uplink = ("phi", "step", "new")
    exact = ("control", "seen")

    class Eta(NamedTuple):
        """The weights, the clients' mean slope per example, and how many clients that is the mean of."""

        mean: Params
        control: Params
        seen: Params

    def init(self, params: Params) -> Eta:
        """No slope is known."""
        first = next(iter(params.values()))
        return self.Eta(params, tree.map(torch.zeros_like, params), {"clients": first.new_zeros(())})

    def stats(self, q: Any) -> Stats:
        """phi, the change of c_s, whether that is the first, and the linear term."""
        return Stats({"phi": q.mean(), "step": q.step, "new": q.new, "tilt_phi": tree.map(torch.mul, q.tilt, q.mean())})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """<c_s - c, phi>."""
        return tree.total(t["tilt_phi"])

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """Two means."""
        return self.Eta(tree.map(lambda phi: phi / t.clients, t["phi"]), *joined(eta.control, eta.seen, t))

    def point(self, eta: Eta) -> Params:
        """The weights."""
        return eta.mean

    def tilt(self, eta: Eta, own: Params | None) -> Params:
        """c_s - c."""
        return tree.map(torch.sub, own or eta.control, eta.control)

    def own(self, eta: Eta, own: Params | None, phi: Params, path: float) -> Params:
        """c_s'."""
        return tree.map(lambda tilt, w, phi: tilt + (w - phi) / path, self.tilt(eta, own), eta.mean, phi)
