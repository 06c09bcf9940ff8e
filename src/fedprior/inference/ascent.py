"""What the gradient E-steps share: what is left of a model, and mini-batch ascent on a bound, per example."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fedprior.core import Eta, Examples, Params
from fedprior.objective import Objective
from fedprior.rng import seeded_globals
from fedprior.slim import Cut


def cut_out(objective: Objective, prior: Any, eta: Eta) -> tuple[Cut, Objective]:
    """The cut of a prior that removes units, and the objective of the slim model."""
    cut = prior.cut(eta)
    small = objective.cut(cut)
    if small is not objective and small.made_by is not None:
        cut = small.made_by  # an equal one, which remembers what it has worked out
    return cut, small


def what_is_left(objective: Objective, prior: Any, eta: Eta) -> tuple[Cut, Objective, Any, Eta]:
    """The cut of a prior that removes units, and the objective, prior and eta of the slim model.

    Such a prior has `cut(eta)` and `groups`, and its eta `mean` and `keep`: values per parameter and per unit.
    """
    cut, small = cut_out(objective, prior, eta)
    small_eta = eta._replace(mean=cut.gather(eta.mean), keep=cut.units(eta.keep))
    return cut, small, replace(prior, groups=cut.small_groups), small_eta


def batches(
    data: Examples, epochs: int, size: int | None, rng: torch.Generator, smallest: int = 1
) -> Iterator[Examples]:
    """Each epoch in a new order; the last batch of an epoch may be smaller. A size of None is the whole set.

    A last batch of fewer than `smallest` examples joins the one before; a client that has fewer sees them repeatedly.
    """
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=rng).to(data.x.device)
        order = order.repeat(-(-smallest // len(order)))[: max(smallest, len(order))]
        x, y = data.x.index_select(0, order), data.y.index_select(0, order)
        sizes = batch_sizes(len(data), size, smallest)
        yield from map(Examples, x.split(sizes), y.split(sizes))


def batch_sizes(examples: int, size: int | None, smallest: int = 1) -> list[int]:
    """The sizes of an epoch's batches, as `batches` makes them."""
    examples = max(examples, smallest)
    size = min(size or examples, examples)
    sizes = [size] * (examples // size) + [examples % size] * (examples % size > 0)
    if len(sizes) > 1 and sizes[-1] < smallest:
        sizes[-2:] = [sum(sizes[-2:])]
    return sizes


def ascend(
    bound: Callable[[Tensor, Tensor], Tensor] | None,
    data: Examples,
    optimizers: Sequence[torch.optim.Optimizer | Descent],
    epochs: int,
    size: int | None,
    rng: torch.Generator,
    after_step: Callable[[], None] = lambda: None,
    smallest: int = 1,
    before_step: Callable[[], None] = lambda: None,
    steps: int = 1,
    differentiate: Callable[[Tensor, Tensor], None] | None = None,
) -> None:
    """Maximise `bound(x, y)`, in nats per example, over what the optimisers hold: `steps` steps a mini-batch.

    `before_step` sees the gradients (of minus the bound) and the values they belong to; `after_step` is called when a
    mini-batch is done. `differentiate` sets the gradients where that is done without the bound, which may be None then.
    """

    def backward(x: Tensor, y: Tensor) -> None:
        assert bound is not None
        value = bound(x, y)
        value.backward(value.new_tensor(-1.0))

    differentiate = differentiate or backward
    with seeded_globals(rng, data.x.device):
        for batch in batches(data, epochs, size, rng, smallest):
            for _ in range(steps):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                differentiate(batch.x, batch.y)
                before_step()
                for optimizer in optimizers:
                    optimizer.step()
            after_step()


def leaves(objective: Objective, params: Params, names: Collection[str] | None = None) -> tuple[Params, list[Tensor]]:
    """A working copy of the parameters, and those of its tensors that are trained: of `names`, or all."""
    filters = torch.channels_last if objective.channels_last else torch.preserve_format
    phi = {
        k: v.detach().clone(memory_format=filters if v.ndim == 4 else torch.preserve_format) for k, v in params.items()
    }
    trained = [phi[k].requires_grad_() for k in objective.trainable if names is None or k in names]
    if not trained:
        raise ValueError(f"none of {', '.join(sorted(names or ()))} is trained: all are buffers, or frozen")
    return phi, trained


def recorded(objective: Objective, phi: Params, trained: Sequence[Tensor]) -> Callable[[Tensor, Tensor], None]:
    """What sets the gradients of `trained`, leaves of `phi`, for a bound that is the log-likelihood alone."""
    values = [phi[k].detach() for k in objective.every]
    program = objective.gradients([k for k in objective.trainable if phi[k].requires_grad])

    def differentiate(x: Tensor, y: Tensor) -> None:
        for value, gradient in zip(trained, program(x, y, *values), strict=True):
            value.grad = gradient

    return differentiate


def detached(params: Params) -> Params:
    """The same values, outside of autograd."""
    return {k: v.detach() for k, v in params.items()}


class Descent:
    """Plain SGD: what torch.optim.SGD computes without momentum, at a fraction of its overhead."""

    def __init__(self, trained: Sequence[Tensor], lr: float) -> None:
        self._trained, self._lr = trained, lr

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for value in self._trained:
            value.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step against the gradients."""
        pairs = [(value, value.grad) for value in self._trained if value.grad is not None]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=-self._lr)  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Epochs:
    """What E-steps of a few epochs over mini-batches have in common.

    Attributes:
        lr: learning rate, for a loss in nats per example.
        epochs: passes over the client's examples.
        batch_size: examples a step; None for all of them.
    """

    lr: float
    epochs: int = 1
    batch_size: int | None = 20

    def __post_init__(self) -> None:
        check_steps(self.lr, self.epochs, self.batch_size)


def check_steps(lr: float, epochs: int, batch_size: int | None) -> None:
    """Refuse what cannot be trained with."""
    if (
        not isinstance(lr, Real)  # NumPy's numbers too
        or not 0 < lr < math.inf
        or epochs < 1
        or (batch_size is not None and batch_size < 1)
    ):
        raise ValueError(
            f"need a finite lr > 0, epochs >= 1 and batch_size >= 1 (or None), got lr={lr!r}, epochs={epochs}, "
            f"batch_size={batch_size}"
        )
