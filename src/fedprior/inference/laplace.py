r"""Online Laplace: SGD to a mode, and a diagonal precision from the squares of the gradients on the way.

    phi by SGD from w on  (1/N_s) sum_i log p(y_i | f(x_i; phi)) + log_prob(eta, T)        the prior per example
    squares = sum_b (B_b / N_s) (dL_b/dphi)^2        over all batches b, of B_b examples, of all epochs
    precision of q = prior.added(eta, squares)

L_b is the mean log-likelihood of a batch: the pull is not in the squares. At batch size 1 and fixed phi one epoch adds
(1/N_s) sum_i (dL_i/dphi)^2, the empirical Fisher of the mean loss. For y = <x, phi> + unit noise that is
(1/N_s) sum_i x_i^2 r_i^2 with residuals r_i: the Hessian's diagonal (1/N_s) sum_i x_i^2 if all r_i^2 = 1, and in
expectation at the true phi, where E r_i^2 = 1. Larger batches square a mean: less than the Fisher.

    paper    code           shape
    Omega    q.precision    as the parameters, per example

Liu et al. 2021, arXiv:2102.01936; their code squares the gradients of batches while it trains, as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors, tree
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Descent, Epochs, ascend, detached, leaves
from fedprior.objective import Objective


@dataclass(frozen=True)
class Laplace(Epochs):
    """SGD that squares its gradients.

    Attributes:
        epochs: each adds to the precision.
    """

    def start(self, prior: Any, eta: Eta) -> posteriors.Gaussian:
        """The prior's point and precision."""
        if not hasattr(prior, "added"):
            raise TypeError(
                f"inference.Laplace needs a prior with a precision for every parameter, and {type(prior).__name__} has "
                "none. Use the prior OnlineLaplace(), or inference.Point(lr=...)."
            )
        return posteriors.Gaussian(prior.point(eta), eta.precision)

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Gaussian, Params | None]:
        """A few epochs from the prior's point; no personal state."""
        phi, trained = leaves(objective, prior.point(eta))
        squares, q = tree.map(torch.zeros_like, phi), posteriors.Gaussian(phi, eta.precision)
        sizes: list[int] = []

        def bound(x: Tensor, y: Tensor) -> Tensor:
            sizes.append(len(x))
            return objective.log_lik(phi, x, y)

        def square_then_pull() -> None:
            pulls = torch.autograd.grad(prior.log_prob(eta, prior.stats(q)), trained)
            for name, pull in zip(objective.trainable, pulls, strict=True):
                if (slope := phi[name].grad) is not None:
                    squares[name] = squares[name] + sizes[-1] / len(client.train) * slope.square()
                    slope.sub_(pull)

        objective.train()
        smallest, optimizers = objective.smallest_batch, [Descent(trained, self.lr)]
        with objective.holding(phi):
            ascend(
                bound,
                client.train,
                optimizers,
                self.epochs,
                self.batch_size,
                rng,
                smallest=smallest,
                before_step=square_then_pull,
            )
        return posteriors.Gaussian(detached(phi), prior.added(eta, squares)), state
