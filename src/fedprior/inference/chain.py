r"""A Langevin chain over the client's own parameters, then SGD on the shared ones at the chain's samples.

    theta    the prior's `effects`: a client's own;      psi: the others, shared
    chain    theta <- theta + lr g + sqrt(2 lr / N_s) xi     per mini-batch, psi held            xi ~ N(0, I)
             g = grad_theta (1/N_s) [ sum_i log p(y_i | f(x_i; psi, theta)) + log p(theta | eta) ]
    samples  theta after each epoch beyond `burn_in`; q is the uniform law over them
    shared   for each sample, an epoch of SGD in psi on the same bound, theta held at the sample

The chain goes on from round to round: its last theta is the client's state. A client never seen begins at the prior's
point. Personal predictions mix the samples of one more E-step. With all examples in one batch, a step is exact
Langevin: on a Gaussian posterior with precision P its law along an eigenvector of P with value p has the variance
1 / (p (1 - lr p / (2 N_s))).

Kotelevskii, Vono, Durmus, Moulines 2022, arXiv:2206.03611 (FedPop; FedSOUL, Algorithm S1 of its supplement, as the
authors' code says). Theirs: the chain with all examples, 10 steps a round of which 5 are burn-in, kept between rounds,
and as many steps in psi as there are samples. Ours: epochs of mini-batches in place of steps, one rate for both, SGD
in psi at one sample after the other where theirs is Adam on the samples' mean, and the server's mean of the clients'
psi. Their image configurations train theta by RMSprop without noise, which is no chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Epochs
from fedprior.inference.point import Point
from fedprior.inference.walk import walk
from fedprior.objective import Objective
from fedprior.priors.parts import take


@dataclass(frozen=True)
class Chain(Epochs):
    """Langevin for the client's own parameters, SGD for the shared ones.

    Attributes:
        lr: of both.
        epochs: of the chain, burn-in included; the shared parameters have one for each sample.
        burn_in: epochs before the first sample; less than `epochs`.
    """

    epochs: int = 10
    burn_in: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.burn_in < self.epochs:
            raise ValueError(f"need 0 <= burn_in < epochs, got burn_in={self.burn_in} and epochs={self.epochs}")

    def start(self, prior: Any, eta: Eta) -> posteriors.Samples:
        """The prior's point."""
        phi = prior.point(eta)
        own = prior.effects(phi) if hasattr(prior, "effects") else {}
        if not own:
            raise TypeError(
                f"inference.Chain needs a prior with parameters to sample, and {type(prior).__name__} has none. Use "
                "the prior Split({'@head': RandomEffects(), '*': Gaussian()}), or inference.Point(lr=...)."
            )
        return posteriors.Samples(phi, (own,))

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[posteriors.Samples, Params]:
        """The chain's samples, and the shared parameters trained at them."""
        start, examples = self.start(prior, eta), len(client.train)
        own, first = start.samples[0].keys(), start.phi | (state or {})
        phi, samples = first, list[Params]()

        def term(phi: Params) -> Tensor:
            return prior.log_prob(eta, prior.stats(posteriors.Point(phi))) / examples

        for epoch, phi in enumerate(walk(self, objective, first, term, client, rng, own)):
            if epoch >= self.burn_in:
                samples.append(take(phi, own))
        shared = phi.keys() - own
        if not shared.isdisjoint(objective.trainable):
            sgd = Point(self.lr, 1, self.batch_size)
            for sample in samples:
                phi = sgd.train(objective, prior, eta, client, rng, phi | sample, shared)
        return posteriors.Samples(phi, tuple(samples)), take(phi, own)

    def personal(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> posteriors.Predictive:
        """The samples of one more E-step, towards this eta."""
        q, _ = self.e_step(objective, prior, eta, client, state, rng)
        return posteriors.Predictive.equal([q.phi | sample for sample in q.samples])
