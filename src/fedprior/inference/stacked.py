r"""The E-steps of many clients as one: parameters with a first dimension of clients, and torch.func.vmap.

Client c of a stack of C takes the steps that `Point` takes for it alone, on the same batches, drawn by the generator of
its own:

    bound_c(phi_c) = mean log-likelihood of c's batch + (1/N_c) log p(phi_c | eta)      phi_c += rate * gradient

so that its phi is the one of the plain loop up to rounding (matrix products of a stack add in another order). Clients
with equally many steps are stacked; where their last batches differ in size, the shorter ones are padded with examples
of weight zero.

Not everything can be stacked: see `why_not`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedprior import posteriors, tree
from fedprior.core import Eta, Examples, Gathered, Params, Prior
from fedprior.inference.ascent import batch_sizes
from fedprior.objective import Objective
from fedprior.recorded import LONG
from fedprior.rng import passed_over

if TYPE_CHECKING:
    from fedprior.inference.point import Point


def why_not(objective: Objective, prior: Any, x: Tensor, y: Tensor) -> str:
    """Why E-steps on such examples cannot be stacked, in words; empty if they can."""
    if hasattr(prior, "cut"):
        return f"{type(prior).__name__} cuts the model"
    if objective.buffers:
        return "the model has running statistics"
    kinds = LONG if x.is_cuda else (*LONG, nn.modules.conv._ConvNd)
    if slow := [type(m).__name__ for m in objective.model.modules() if isinstance(m, kinds)]:
        return f"stacked {slow[0]} layers are slow"
    phi = {k: v.expand(2, *v.shape) for k, v in objective.params().items()}
    objective.train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            _gradients(objective, phi, x[:1].expand(2, *x[:1].shape), y[:1].expand(2, *y[:1].shape), None)
        except RuntimeError as error:  # vmap's answer to layers that draw, or decide by their data
            return f"the model cannot be stacked: {str(error).splitlines()[0]}"
    if slow := [str(w.message) for w in told if "batching rule" in str(w.message)]:  # attention has none
        operation = slow[0].split("rule for ")[-1].split(". ")[0]
        return f"a stack would be slow: PyTorch has no batching rule for {operation}"
    return ""


def e_steps(
    point: Point, objective: Objective, prior: Prior, eta: Eta, data: Gathered, rngs: Sequence[torch.Generator]
) -> Params:
    """The parameters after a few epochs from the prior's point, each of shape (clients, ...)."""
    objective.train()
    start, groups = prior.point(eta), _equal_steps(data.sizes, point.batch_size)
    for rng in rngs:
        passed_over(rng)  # what the plain loop lends to layers that draw: there are none here
    stacks = []
    for rows in groups:
        same = {k: v.detach().expand(len(rows), *v.shape) for k, v in start.items()}
        stacks.append(_train(point, objective, prior, eta, data.part(rows), [rngs[r] for r in rows], same))
    if len(groups) == 1:
        return stacks[0]
    place = torch.tensor([row for rows in groups for row in rows]).argsort()
    return {k: torch.cat([stack[k] for stack in stacks])[place.to(v.device)] for k, v in start.items()}


def _equal_steps(sizes: Sequence[int], batch_size: int | None) -> list[list[int]]:
    """Positions of clients with equally many steps an epoch; where a batch is all of a client, those of equal size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(sizes):
        key = (1, size) if batch_size is None else (-(-size // batch_size), 0)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _train(
    point: Point,
    objective: Objective,
    prior: Prior,
    eta: Eta,
    data: Gathered,
    rngs: Sequence[torch.Generator],
    phi: Params,
) -> Params:
    """All epochs of the clients, from `phi`, which stays as it is."""
    phi, start = dict(phi), dict(phi)
    like, sizes = next(iter(phi.values())), data.sizes
    count = torch.tensor(sizes).to(like)
    term = _prior_term(prior, eta)
    velocity: Params = {}
    for _ in range(point.epochs):
        examples, here = _shuffled(data, rngs, like.device)
        first = 0
        for size in batch_sizes(max(sizes), point.batch_size):
            part = slice(first, first + size)
            weight = None if here is None or bool(here[:, part].all()) else here[:, part].to(like)
            gradient = _gradients(objective, phi, examples.x[:, part], examples.y[:, part], weight)
            if term is not None:
                gradient = tree.map(lambda g, p: g + p, gradient, _pull(term, objective, phi, count))
            _descend(point, phi, start, gradient, velocity)
            first += size
    return {k: v.clone() if v is start[k] else v for k, v in phi.items()}


def _shuffled(data: Gathered, rngs: Sequence[torch.Generator], device: Any) -> tuple[Examples, Tensor | None]:
    """The clients' examples, each in an order of its own, (clients, largest, ...); which of them are no padding."""
    sizes, here = data.sizes, None
    orders = [torch.randperm(size, generator=rng) for size, rng in zip(sizes, rngs, strict=True)]
    starts = torch.tensor([0, *accumulate(sizes)][:-1])[:, None]
    if min(sizes) == max(sizes):
        index = torch.stack(orders) + starts
    else:
        index = nn.utils.rnn.pad_sequence(orders, batch_first=True) + starts  # padded with a client's first example
        here = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).to(device)
    index = data.where[index]
    x, y = (
        v.index_select(0, index.flatten().to(v.device)).unflatten(0, index.shape).to(device)
        for v in (data.examples.x, data.examples.y)
    )
    return Examples(x, y), here


def _gradients(objective: Objective, phi: Params, x: Tensor, y: Tensor, weight: Tensor | None) -> Params:
    """Of minus the mean log-likelihood of each client's batch, for what is trained."""

    def loss(trained: Params, fixed: Params, x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        every = {**fixed, **trained}
        if weight is None:
            return -objective.log_lik(every, x, y)
        return -(objective.loss.log_lik(objective.outputs(every, x), y) * weight).sum() / weight.sum()

    def function(x: Tensor, y: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        phi, weight = dict(zip(objective.every, values, strict=False)), [*values[len(objective.every) :], None][0]
        fixed = {k: v for k, v in phi.items() if k not in objective.trainable}
        dims = (0, 0, 0, 0, None if weight is None else 0)
        trained = {k: phi[k] for k in objective.trainable}
        return tuple(torch.func.vmap(torch.func.grad(loss), in_dims=dims)(trained, fixed, x, y, weight).values())

    values = [phi[k] for k in objective.every] + ([] if weight is None else [weight])
    name = "stacked" if weight is None else "stacked, weighted"
    return dict(zip(objective.trainable, objective.recorded(name, function)(x, y, *values), strict=True))


def _prior_term(prior: Prior, eta: Eta) -> Any:
    """phi -> log p(phi | eta), or None for a flat prior."""

    def term(phi: Params) -> Tensor:
        return prior.log_prob(eta, prior.stats(posteriors.Point(phi)))

    leaf = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in prior.point(eta).items()}
    return term if term(leaf).requires_grad else None


def _pull(term: Any, objective: Objective, phi: Params, count: Tensor) -> Params:
    """The gradient of minus the prior's term, per example, for what is trained."""

    def loss(trained: Params, fixed: Params, count: Tensor) -> Tensor:
        return -term({k: trained.get(k, fixed.get(k)) for k in phi}) / count

    trained = {k: phi[k] for k in objective.trainable}
    fixed = {k: v for k, v in phi.items() if k not in trained}
    return torch.func.vmap(torch.func.grad(loss))(trained, fixed, count)


def _descend(point: Point, phi: Params, start: Params, gradient: Params, velocity: Params) -> None:
    """SGD, with momentum as torch.optim.SGD has it; the first step leaves `start`."""
    for k, g in gradient.items():
        if point.momentum:
            velocity[k] = g = velocity[k].mul_(point.momentum).add_(g) if k in velocity else g
        phi[k] = torch.add(phi[k], g, alpha=-point.lr, out=None if phi[k] is start[k] else phi[k])
