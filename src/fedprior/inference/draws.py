r"""SGD in the mean and the width of a Gaussian, by draws.

    maximise  E_q log-likelihood per example + term(m, log s),     q = N(m, diag s^2)
    each step: one draw phi = m + s e, e ~ N(0, I), and a step of SGD in (m, log s) against the slopes
        g + a + b m   and   g s e + c s^2 + d           g: the gradient of the mean loss at phi

`term` is minus a divergence from a prior whose log_prob is linear in moments: its slopes are affine in m and in s^2.
The coefficients a, b, c and d do not change during an E-step, and are found once.

    paper   code                   shape
    s       exp(wide)              as the parameters

Blundell et al. 2015, arXiv:1505.05424.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors, tree
from fedprior.core import Client, Params
from fedprior.inference.ascent import Descent, Epochs, ascend, detached, leaves
from fedprior.objective import Objective


def climb(
    how: Epochs,
    objective: Objective,
    m: Params,
    wide: Params,
    term: Callable[[Params, Params], Tensor],
    client: Client,
    rng: torch.Generator,
    names: Collection[str] | None = None,
) -> tuple[Params, Params]:
    """m and wide after SGD in both, of the parameters `names`, or all.

    Args:
        how: rate, epochs and batches.
        objective: the model and its loss.
        m: the means, and values of what has no width.
        wide: log s of those that have one.
        term: (m, wide) -> minus the divergence, in nats per example: a quadratic in m and s, plus multiples of log s.
        client: whose examples.
        rng: of batches and draws.
        names: what is trained; the rest is held, and drawn if it has a width.
    """
    m, trained = leaves(objective, m, names)
    wide = {k: w.detach().clone().requires_grad_(m[k].requires_grad) for k, w in wide.items()}
    free = [k for k in objective.trainable if m[k].requires_grad]
    drawn, widths = [k for k in objective.trainable if k in wide], [w for w in wide.values() if w.requires_grad]
    program, (a, b, c, d) = objective.gradients(free), _pull(term, m, wide)
    at, log_s = detached(m), detached(wide)  # the same memory

    def differentiate(x: Tensor, y: Tensor) -> None:
        e, s = _noise(at, drawn, rng), {k: log_s[k].exp() for k in drawn}
        phi = at | {k: torch.addcmul(at[k], s[k], e[k]) for k in drawn}
        for k, slope in zip(free, program(x, y, *(phi[name] for name in objective.every)), strict=True):
            slope = torch.zeros_like(at[k]) if slope is None else slope
            m[k].grad = slope + a[k] + b[k] * at[k]
            if k in s:
                wide[k].grad = slope * s[k] * e[k] + c[k] * s[k].square() + d[k]

    objective.train()
    optimizers, smallest = [Descent([*trained, *widths], how.lr)], objective.smallest_batch
    with objective.holding(m):
        steps: dict[str, Any] = {"smallest": smallest, "differentiate": differentiate}
        ascend(None, client.train, optimizers, how.epochs, how.batch_size, rng, **steps)
    return at, log_s


def _pull(term: Callable[[Params, Params], Tensor], m: Params, wide: Params) -> tuple[Params, Params, Params, Params]:
    """a, b, c, d: the gradient of -term is a + b m in m, and c s^2 + d in log s, by its values at two places."""

    def slopes(far: float) -> tuple[Params, Params]:
        places = [
            {k: (v.detach() + by).requires_grad_(v.requires_grad) for k, v in part.items()}
            for part, by in ((m, far), (wide, 0.5 * math.log1p(far)))
        ]
        leaves, value = [v for part in places for v in part.values() if v.requires_grad], -term(*places)
        if value.requires_grad:
            value.backward(inputs=leaves)
        at_m, at_wide = (
            {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in part.items()} for part in places
        )
        return at_m, at_wide

    (near, wide_near), (far, wide_far) = slopes(0.0), slopes(1.0)
    b, c = tree.map(torch.sub, far, near), tree.map(lambda v, u, w: (v - u) / (2 * w).exp(), wide_far, wide_near, wide)
    a = tree.map(lambda v, along, at: v - along * at.detach(), near, b, m)
    d = tree.map(lambda u, v: 2 * u - v, wide_near, wide_far)
    return a, b, detached(c), d


def mixed_draws(m: Params, wide: Params, draws: int, rng: torch.Generator) -> posteriors.Predictive:
    """Equal weights for draws m + s e of N(m, diag s^2); what has no width stays at m."""
    s = tree.map(torch.exp, wide)
    return posteriors.Predictive.equal(
        [m | {k: m[k] + s[k] * e for k, e in _noise(m, s, rng).items()} for _ in range(draws)]
    )


def _noise(like: Params, names: Iterable[str], rng: torch.Generator) -> Params:
    return {k: torch.randn(like[k].shape, generator=rng, dtype=like[k].dtype).to(like[k].device) for k in names}
