r"""The tilted distribution of a client, as a diagonal Gaussian, and what that makes of the client's factor.

    cavity   q / t_s                      (stateless, FedSEP: q^(1 - 1/S), as if all S factors were equal)
    tilted   r(theta) ~ cavity(theta) p(D_s | theta), near N(m, 1/L), found by variational Newton steps of size lr:
                 e = +1 or -1 at random,  d = spread e / sqrt(L),  g± = slope of the mean loss at m ± d
                 g = (g+ + g-) / 2,   h = e (g+ - g-) sqrt(L) / (2 spread),  at least 0
                 L <- (1 - lr) L + lr (L_cavity + N_s h)
                 m <- m - lr (N_s g + L_cavity (m - m_cavity)) / (L + levenberg N_s)
    change   damping (r / q) of t_s, kept by the client and sent
    personal the mean of r from cavity^trust, for a client that predicts for itself

With spread = 1 the two points are a rule of E_r[slope] and E_r[curvature]: variational inference (PVI). With a small
spread they are the slope and curvature at m: Laplace's approximation of r's moments (FedEP). h is unbiased for the
curvature's diagonal, and exact where the curvature is diagonal: there lr = 1 on full batches is the exact r for
linear-Gaussian clients, and one undamped round of everybody is the exact product posterior. Where the curvature is not
diagonal a converged mean is still that of the product posterior (sum_s N_s g_s + prior = 0), and precisions are the
diagonals of precisions: mean-field, too sure. FedSEP's product has no p(theta), which is spread over the factors.
Factors have precisions >= 0, hence a cavity has at least that of p(theta), which rounding could undercut.

Where inputs are correlated, a Newton step by the diagonal alone overshoots in their common direction: `levenberg` is a
curvature per example that every step reckons with besides. It moves no fixed point; 0 is for diagonal curvature. A
shared theta leaves a client nothing of its own: r is little else than q. `trust` < 1 is the usual power prior (Ibrahim,
Chen 2000): 1/S counts all others as one client, 1 believes in a shared theta.

    paper     code          shape                    paper         code     shape
    Delta     q             as the parameters        t_s           state    {"precision/name", "shift/name"}

Bui et al. 2018, arXiv:1811.11206; Guo et al. 2023, arXiv:2302.04228; Khan, Lin 2017, arXiv:1703.04265 (the steps, with
averages over one pair of points instead of Monte Carlo). Damping multiplies the change: 1 is none. levenberg and trust
are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedprior import posteriors, tree
from fedprior.core import Client, Eta, Examples, Params
from fedprior.inference.ascent import batches, check_steps
from fedprior.objective import Objective
from fedprior.rng import seeded_globals


@dataclass(frozen=True)
class Sites:
    """Variational Newton on the tilted distribution.

    Attributes:
        lr: of the Newton steps; in (0, 1].
        epochs: passes over the client's examples.
        batch_size: examples a step; None for all of them.
        damping: which part of the change is made; in (0, 1].
        spread: distance of the two points, in standard deviations; > 0.
        clients: how many there are, for FedSEP, whose clients keep no factor; None for PVI and FedEP, whose do.
        levenberg: curvature of the mean loss that steps reckon with besides the diagonal; >= 0.
        trust: power of the cavity in a personal prediction; in (0, 1].
    """

    lr: float = 0.1
    epochs: int = 1
    batch_size: int | None = 20
    damping: float = 0.25
    spread: float = 1.0
    clients: int | None = None
    levenberg: float = 4.0
    trust: float = 0.03

    def __post_init__(self) -> None:
        check_steps(self.lr, self.epochs, self.batch_size)
        parts = all(0 < v <= 1 for v in (self.lr, self.damping, self.trust))
        if not (parts and self.spread > 0 and self.levenberg >= 0 and (self.clients or 2) >= 2):
            need = "need lr, damping and trust in (0, 1], spread > 0, levenberg >= 0 and clients >= 2 (or None)"
            raise ValueError(f"{need}, got {self}")

    def start(self, prior: Any, eta: Eta) -> posteriors.Site:
        """No change."""
        if not hasattr(eta, "shift"):
            raise TypeError(
                f"inference.Sites needs a prior in natural parameters, and {type(prior).__name__} is none. "
                "Use the prior Sites(precision=...), or inference.Point(lr=...)."
            )
        zeros = tree.map(torch.zeros_like, eta.shift)
        return posteriors.Site(zeros, zeros)

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Site, Params | None]:
        """The change of the client's factor; its state is the factor."""
        if objective.buffers:
            raise ValueError("inference.Sites has no rule for running means: use a model without them (GroupNorm, say)")
        site = self._site(eta, state)
        tilted = self._tilted(objective, eta, self._cavity(prior, eta, site), client, rng)
        change = _power(_times(tilted, _power(eta, -1)), self.damping)
        state = tree.flatten(_times(site, change)) if self.clients is None else state
        return posteriors.Site(*change), state

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """The mean of r, from the cavity's power."""
        cavity = _power(self._cavity(prior, eta, self._site(eta, state)), self.trust)
        return posteriors.Predictive.point(prior.point(self._tilted(objective, eta, cavity, client, rng)))

    def _site(self, eta: Eta, state: Params | None) -> Eta:
        """Natural parameters of t_s; none yet without a state."""
        return tree.unflatten(eta, tree.map(torch.zeros_like, tree.flatten(eta)) if state is None else state)

    def _cavity(self, prior: Any, eta: Eta, site: Eta) -> Eta:
        """Natural parameters of q / t_s."""
        if self.clients is not None:
            return _power(eta, 1 - 1 / self.clients)
        precision = tree.map(lambda a, b: (a - b).clamp(min=prior.precision), eta.precision, site.precision)
        return type(eta)(precision, tree.map(torch.sub, eta.shift, site.shift))

    def _tilted(self, objective: Objective, eta: Eta, cavity: Eta, client: Client, rng: torch.Generator) -> Eta:
        """Natural parameters of r. Dropout is off: the posterior is the noise here."""
        m, precision, examples = tree.map(torch.div, eta.shift, eta.precision), dict(eta.precision), len(client.train)
        objective.train(False)
        with seeded_globals(rng, client.train.x.device):
            for batch in batches(client.train, self.epochs, self.batch_size, rng):
                signs = {k: (2 * torch.randint(2, m[k].shape, generator=rng) - 1).to(m[k]) for k in objective.trainable}
                steps = {k: self.spread * e / precision[k].sqrt() for k, e in signs.items()}
                above, below = (_slopes(objective, m, steps, side, batch) for side in (1, -1))
                for k, e in signs.items():
                    slope = examples * (above[k] + below[k]) / 2
                    curvature = examples * (e * (above[k] - below[k]) * precision[k].sqrt() / (2 * self.spread))
                    target = cavity.precision[k] + curvature.clamp(min=0)
                    precision[k] = (1 - self.lr) * precision[k] + self.lr * target
                    slope = slope + cavity.precision[k] * m[k] - cavity.shift[k]
                    m[k] = m[k] - self.lr * slope / (precision[k] + self.levenberg * examples)
        return type(eta)(precision, tree.map(torch.mul, precision, m))


def _power(natural: Eta, by: float) -> Eta:
    return type(natural)(*(tree.map(lambda v: by * v, part) for part in natural))


def _times(one: Eta, other: Eta) -> Eta:
    return type(one)(*(tree.map(torch.add, *pair) for pair in zip(one, other, strict=True)))


def _slopes(objective: Objective, m: Params, steps: Params, side: int, batch: Examples) -> Params:
    """Of the mean loss, at m + side steps."""
    phi = m | {k: (m[k] + side * d).requires_grad_() for k, d in steps.items()}
    loss = -objective.log_lik(phi, batch.x, batch.y)
    grads = torch.autograd.grad(loss, [phi[k] for k in steps], allow_unused=True, materialize_grads=True)
    return dict(zip(steps, grads, strict=True))
