r"""Hard EM: the posterior is a point, found by a few epochs of SGD from the prior's own point.

    maximise  (1/N_s) sum_i log p(y_i | f(x_i; phi)) + (1/N_s) (log p(phi | eta) - penalty(phi))

exp(-penalty) is a factor of the prior that knows nothing of eta: the M-step does not see it.
A truncated search acts as a prior of its own, which is why FedAvg trains at precision 0.
If the prior has `cut(eta)`, what it leaves of the model is cut out first (slim.py), and only that is trained.
McMahan et al. 2017, arXiv:1602.05629, Algorithm 1 (ClientUpdate).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors
from fedprior.core import Client, Eta, Gathered, Params, Prior
from fedprior.inference import stacked
from fedprior.inference.ascent import Descent, Epochs, ascend, detached, leaves, recorded, what_is_left
from fedprior.objective import Objective


@dataclass(frozen=True)
class Point(Epochs):
    """SGD, or any PyTorch optimiser.

    Attributes:
        momentum: of SGD.
        optimizer: tensors -> torch.optim.Optimizer, instead of SGD(lr, momentum).
        penalty: (objective, phi) -> scalar, in nats per client's data set; what it adds to the loss of an example is
            divided by the client's number of examples, as the prior's term is.
    """

    momentum: float = 0.0
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    penalty: Callable[[Objective, Params], Tensor] | None = None

    def start(self, prior: Prior, eta: Eta) -> posteriors.Point:
        """The prior's point."""
        return posteriors.Point(prior.point(eta))

    def e_step(
        self,
        objective: Objective,
        prior: Any,
        eta: Eta,
        client: Client,
        state: Params | None,
        rng: torch.Generator,
    ) -> tuple[Any, Params | None]:
        """A few epochs from the prior's point, on what is left of the model; no personal state."""
        if not hasattr(prior, "cut"):
            return posteriors.Point(self.train(objective, prior, eta, client, rng)), state
        cut, small, small_prior, small_eta = what_is_left(objective, prior, eta)
        phi = self.train(small, small_prior, small_eta, client, rng)
        return posteriors.Point(cut.scatter(phi)), state

    def why_not_stacked(self, objective: Objective, prior: Prior, x: Tensor, y: Tensor) -> str:
        """Why `e_steps` cannot be called for such examples; empty if it can (stacked.py)."""
        if self.optimizer is not None:
            return "an optimizer of the user's own is stepped for each client"
        if self.penalty is not None:
            return "a penalty is computed for each client"
        return stacked.why_not(objective, prior, x, y)

    def e_steps(
        self, objective: Objective, prior: Prior, eta: Eta, data: Gathered, rngs: Sequence[torch.Generator]
    ) -> posteriors.Point:
        """The E-steps of several clients at once: a posterior whose tensors have a first dimension of clients."""
        return posteriors.Point(stacked.e_steps(self, objective, prior, eta, data, rngs))

    def train(
        self,
        objective: Objective,
        prior: Prior,
        eta: Eta,
        client: Client,
        rng: torch.Generator,
        start: Params | None = None,
        names: Collection[str] | None = None,
    ) -> Params:
        """A few epochs from `start`, or from the prior's point; of the parameters `names`, or all. Buffers move."""
        phi, trained = leaves(objective, prior.point(eta) if start is None else start, names)
        q = posteriors.Point(phi)
        examples = len(client.train)

        def prior_term() -> Tensor:
            log_prob = prior.log_prob(eta, prior.stats(q))
            return log_prob if self.penalty is None else log_prob - self.penalty(objective, phi)

        pulls = prior_term().requires_grad  # a flat prior does not

        def bound(x: Tensor, y: Tensor) -> Tensor:
            log_lik = objective.log_lik(phi, x, y)
            return log_lik + prior_term() / examples if pulls else log_lik

        objective.train()
        how: dict[str, Any] = {"smallest": objective.smallest_batch}
        if not pulls and objective.recordable:
            how["differentiate"] = recorded(objective, phi, trained)
        with objective.holding(phi):
            ascend(bound, client.train, [self._optimizer(trained)], self.epochs, self.batch_size, rng, **how)
        return detached(phi)

    def _optimizer(self, trained: list[Tensor]) -> torch.optim.Optimizer | Descent:
        if self.optimizer is not None:
            return self.optimizer(trained)
        return (
            torch.optim.SGD(trained, lr=self.lr, momentum=self.momentum) if self.momentum else Descent(trained, self.lr)
        )
