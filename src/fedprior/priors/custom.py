r"""A prior from one bare function: its M-step is a gradient step.

    log_prob(eta, phi) = log p(phi | eta)                      the researcher writes this
    T = grad_eta log p(phi_s | eta)     at the round's eta     what a client uploads
    M-step   eta' = eta + rate (1/S) sum_s T_s                 generalised EM

With rate below 2 / (curvature of log_prob) a step does not decrease sum_s log p(phi_s | eta); any server step
(server.Adam, ...) can take the place of the plain step. For a Gaussian of precision lambda, rate = 1/lambda is the
exact M-step.

    paper   code            shape
    eta     eta.mean        as the parameters, unless `make_eta` returns a NamedTuple of its own
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedprior import tree
from fedprior.core import Params, Stats


class Mean(NamedTuple):
    """The default eta: one value per parameter."""

    mean: Params


@dataclass(frozen=True)
class Custom:
    """Any differentiable log p(phi | eta).

    Attributes:
        function: (eta, phi) -> scalar, in nats up to a constant.
        rate: step size of the M-step per client.
        make_eta: initial parameters -> eta, a NamedTuple of dicts of tensors; its field `mean` (or `to_point`)
            gives the model.
        to_point: eta -> Params, if eta has no field `mean`.
    """

    function: Callable[[Any, Params], Tensor]
    rate: float = 1.0
    make_eta: Callable[[Params], Any] = Mean
    to_point: Callable[[Any], Params] | None = None
    uplink = ("gradient",)

    def init(self, params: Params) -> Any:
        """The user's eta."""
        return self.make_eta(params)

    def stats(self, q: Any) -> Stats:
        """The parameters themselves: enough for one client's log_prob."""
        return Stats({"phi": q.mean()})

    def message(self, eta: Any, q: Any) -> Stats:
        """The gradient of log_prob with respect to eta."""
        leaves = {k: v.detach().requires_grad_() for k, v in tree.flatten(eta).items()}
        value = self._value(tree.unflatten(eta, leaves), q.mean())
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return Stats({"gradient": dict(zip(leaves, grads, strict=True))})

    def log_prob(self, eta: Any, t: Stats) -> Tensor:
        """log p(phi | eta) of one client."""
        if t.clients != 1:
            raise ValueError(f"Custom.log_prob is for one client's statistics, got the sum of {t.clients}")
        return self._value(eta, t["phi"])

    def _value(self, eta: Any, phi: Params) -> Tensor:
        """What `function` says; a TypeError for anything but a scalar."""
        value = self.function(eta, phi)
        if not isinstance(value, Tensor) or value.dim():
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"function of priors.Custom must return a tensor with one number, in nats, got {got}: sum it"
            )
        return value

    def m_step(self, eta: Any, t: Stats) -> Any:
        """One gradient step."""
        flat = tree.flatten(eta)
        return tree.unflatten(eta, tree.map(lambda e, g: e + self.rate / t.clients * g, flat, t["gradient"]))

    def point(self, eta: Any) -> Params:
        """eta.mean, or what `to_point` says."""
        if self.to_point is not None:
            return self.to_point(eta)
        if not hasattr(eta, "mean"):
            raise TypeError(f"{type(eta).__name__} has no field `mean`: pass to_point=... to priors.Custom")
        return eta.mean
