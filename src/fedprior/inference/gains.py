r"""Hard EM in the weights, and what each unit is worth: the evidence for its gate.

    phi by SGD on  (1/N_s) sum_i log p(y_i | f(x_i; phi)) + (1/N_s) log_prob(eta, T), all gates of what is left open
    gain_g = log p(D_s | z_g = 1) - log p(D_s | z_g = 0)
           ≈ l'(1) - l''(1)/2                            l(z) = log p(D_s | phi with the entries of g times z)
           ≈ (N_s / 2) mean_b B_b (dL_b/dz_g)^2          L_b = mean log-likelihood of mini-batch b, of B_b examples

The second line is l(0) to second order; the third drops l', which is zero where phi is at its optimum, and takes
Fisher's information for -l'': the variance of a batch's gradient times B_b estimates that of one example's. The
gradient costs little more, dL/dz_g = sum_{j of g} phi_j dL/dphi_j, and no gate is sampled: no noise.
The client trains the slim model (slim.py), of which it was sent the weights, and knows of no other unit.

    paper    code      shape
    gain     q.gain    group -> (units left,), nats over the client's data set

LeCun, Denker, Solla 1989 (optimal brain damage); Theis et al. 2018, arXiv:1801.05787, section 2 (Fisher pruning).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprior import posteriors, structure, tree
from fedprior.core import Client, Eta, Params
from fedprior.inference.ascent import Descent, Epochs, ascend, batch_sizes, cut_out, detached, leaves, recorded
from fedprior.objective import Objective
from fedprior.structure import Group


@dataclass(frozen=True)
class Gains(Epochs):
    """SGD on what is left of the model."""

    def start(self, prior: Any, eta: Eta) -> posteriors.Gains:
        """The prior's weights; nothing is known of the units."""
        if not hasattr(prior, "cut"):
            raise TypeError(
                f"inference.Gains needs a prior with gates that clients share, and {type(prior).__name__} has none. "
                "Use the prior SharedGates(density=...), or inference.Point(lr=...)."
            )
        return posteriors.Gains(eta.mean, tree.map(torch.zeros_like, eta.gain))

    def e_step(
        self, objective: Objective, prior: Any, eta: Eta, client: Client, state: Params | None, rng: torch.Generator
    ) -> tuple[Any, Params | None]:
        """A few epochs on what is left of the model; no personal state."""
        cut, small = cut_out(objective, prior, eta)
        return self._train(small, prior, cut.small_groups, eta, client, rng), state

    def _train(
        self,
        objective: Objective,
        prior: Any,
        groups: tuple[Group, ...],
        eta: Eta,
        client: Client,
        rng: torch.Generator,
    ) -> posteriors.Gains:
        """The same, of the slim model and its groups."""
        phi, trained = leaves(objective, eta.mean)
        examples = len(client.train)
        nothing = tree.map(torch.zeros_like, eta.gain)
        slopes: list[tuple[Tensor, ...]] = []

        def prior_term() -> Tensor:
            return prior.log_prob(eta, prior.stats(posteriors.Gains(phi, nothing)))

        pulls = prior_term().requires_grad  # a flat slab does not

        def bound(x: Tensor, y: Tensor) -> Tensor:
            log_lik = objective.log_lik(phi, x, y)
            return log_lik + prior_term() / examples if pulls else log_lik

        objective.train()
        smallest, optimizers = objective.smallest_batch, [Descent(trained, self.lr)]
        how: dict[str, Any] = {"smallest": smallest}
        if not prior.settled(eta):
            look = _look(objective, groups, phi)
            how["before_step"] = lambda: slopes.append(look())
        if not pulls and objective.recordable:
            how["differentiate"] = recorded(objective, phi, trained)
        with objective.holding(phi):
            ascend(bound, client.train, optimizers, self.epochs, self.batch_size, rng, **how)
        if not slopes:
            return posteriors.Gains(detached(phi), nothing)
        sizes = self.epochs * batch_sizes(examples, self.batch_size, smallest)
        return posteriors.Gains(detached(phi), _gains(groups, slopes, sizes, examples))


def _look(objective: Objective, groups: tuple[Group, ...], phi: Params) -> Callable[[], tuple[Tensor, ...]]:
    """What gives dL/dz_g = sum of phi_j dL/dphi_j over what g owns, up to the sign, (units,) for each of the groups."""
    names = tuple(dict.fromkeys(m.name for group in groups for m in group.members if m.out))

    def slopes(*tensors: Tensor) -> tuple[Tensor, ...]:
        products = map(torch.mul, tensors[: len(names)], tensors[len(names) :])
        found = structure.sums(groups, dict(zip(names, products, strict=True)))
        return tuple(found[group.name] for group in groups)

    def look() -> tuple[Tensor, ...]:
        grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in own]  # None where frozen
        return program(*values, *grads)

    own = [phi[name] for name in names]
    values, program = [v.detach() for v in own], objective.recorded(f"slopes of {' '.join(names)}", slopes)
    return look


def _gains(groups: tuple[Group, ...], slopes: list[tuple[Tensor, ...]], sizes: list[int], examples: int) -> Params:
    """(N_s / 2) mean_b B_b (dL_b/dz_g)^2, group -> (units,)."""
    every = {group.name: torch.stack([of_batch[i] for of_batch in slopes]) for i, group in enumerate(groups)}
    return {g: 0.5 * examples * (d.new_tensor(sizes)[:, None] * d.square()).mean(0) for g, d in every.items()}
