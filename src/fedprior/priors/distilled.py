r"""Two models at the server: the mean of the clients' posterior samples, and the mean of their distilled predictives.

    phi_s ~ N(w, .) and student_s ~ N(v, .), both flat:   log p = const
    T = (phi, student);   M-step   w = sum_s phi_s / sum_s 1,   v = sum_s student_s / sum_s 1

    paper      code         shape                    paper      code          shape
    teacher    eta.mean     as the parameters        student    eta.student   as the parameters

v is what is deployed: one pass gives a predictive without samples. Bhatt, Gupta, Rai 2023, arXiv:2206.07562 (FedPPD);
of the paper's three servers this is the first, the average, since it needs sums only. Both have the same architecture
here; the paper's student may be larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Params, Stats


@dataclass(frozen=True)
class Distilled:
    """Flat over a teacher and a student."""

    uplink = ("phi", "student")

    class Eta(NamedTuple):
        """The means of the clients' teachers and students."""

        mean: Params
        student: Params

    def init(self, params: Params) -> Eta:
        """Both start at the model's initial parameters."""
        return self.Eta(params, dict(params))

    def stats(self, q: Any) -> Stats:
        """phi and the student."""
        return Stats({"phi": q.mean(), "student": q.student})

    def log_prob(self, eta: Eta, t: Stats) -> Tensor:
        """Flat."""
        return torch.zeros(())

    def m_step(self, eta: Eta, t: Stats) -> Eta:
        """The means over clients."""
        return self.Eta(*(tree.map(lambda v: v / t.clients, t[term]) for term in self.uplink))

    def point(self, eta: Eta) -> Params:
        """The student."""
        return eta.student
