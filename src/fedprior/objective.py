r"""The training objective: a model and the log-likelihood of one example under it.

    log p(D_s | phi) = sum_i log p(y_i | f(x_i; phi))      over the client's N_s examples, in nats

An E-step works on mini-batches, hence with the mean log-likelihood of a batch, and divides the terms of
the prior by N_s: both sides are then nats per example, and the balance is that of the sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedprior.core import Params
from fedprior.kernels import Views, faster
from fedprior.losses import LOSSES, Loss, PerExample, as_loss
from fedprior.posteriors import Predictive
from fedprior.recorded import OWN, Function, Programs, may_be_recorded
from fedprior.slim import Cut, slim


def params_of(model: nn.Module) -> Params:
    """A copy of a model's parameters and floating-point buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone() for name, value in named if value.is_floating_point()}


class Objective:
    """A model as a function of its parameters, and the log-likelihood of its outputs.

    Floating-point buffers (running means of batch norm) are part of Params: they are averaged like
    parameters, but no gradient reaches them. The module given is copied to `device` and never changed.

    Attributes:
        every: names of its parameters and floating-point buffers.
        made_by: the cut, if the model was cut out of a larger one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss | PerExample = "classification",
        device: str | torch.device | None = None,
    ) -> None:
        self.loss = as_loss(loss)
        self.model = copy.deepcopy(model).to(device)  # None leaves it where it is
        self.trainable = tuple(name for name, p in self.model.named_parameters() if p.requires_grad)
        parameters = dict(self.model.named_parameters())
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.smallest_batch = 2 if norms else 1  # a batch norm cannot be trained on one example
        self.every = tuple(self.params())
        self.buffers = frozenset(name for name in self.every if name not in parameters)
        self._counters = {k: b.clone() for k, b in self.model.named_buffers() if not b.is_floating_point()}
        self._smaller: tuple[Cut, Objective] | None = None
        self.made_by: Cut | None = None
        self._held: Params | None = None
        self._recorded: dict[str, Programs] = {}
        foreign = not all(type(m).__module__.startswith(OWN) for m in self.model.modules())
        self._views = Views() if foreign and any(p.ndim == 4 for p in self.model.parameters()) else None
        self.train(self.model.training)

    def params(self) -> Params:
        """A copy of the model's parameters and floating-point buffers."""
        return params_of(self.model)

    def count(self, params: Params) -> int:
        """Entries of the model's parameters in `params`; buffers do not count."""
        return sum(value.numel() for name, value in params.items() if name not in self.buffers)

    def train(self, mode: bool = True) -> None:
        """Switch layers such as dropout and batch norm, and set integer counters of batches back."""
        self.model.train(mode)
        self._counting = {name: value.clone() for name, value in self._counters.items()}

    @contextmanager
    def holding(self, phi: Params) -> Iterator[None]:
        """The model holds `phi` itself until the end of the block: `outputs(phi, x)` is then a plain call.

        Layers that `kernels` has a faster form of have it, for first derivatives.
        """
        values, before = {**phi, **self._counting}, []
        for name, slot, key in self._slots:
            if name in values:
                before.append((slot, key, slot[key]))
                slot[key] = values[name]
        outer, self._held = self._held, phi
        quick = self._faster if outer is None else []
        for module, forward in quick:
            module.forward = forward
        try:
            yield
        finally:
            self._held = outer
            for module, _ in quick:
                del module.forward
            for slot, key, value in before:
                slot[key] = value

    @cached_property
    def _slots(self) -> list[tuple[str, dict[str, Any], str]]:
        """Where the model keeps each parameter and buffer; a tied one has several places and one name."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        names = {id(value): name for name, value in named}
        return [
            (names[id(value)], slots, key)
            for module in self.model.modules()
            for slots in (module._parameters, module._buffers)
            for key, value in slots.items()
            if value is not None
        ]

    @cached_property
    def channels_last(self) -> bool:
        """Should filters have their channels last in memory?

        Convolutions are a third faster on a CPU then, and group norms of what they give ten times slower.
        """
        return not any(isinstance(m, nn.GroupNorm) for m in self.model.modules())

    @cached_property
    def _faster(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        return faster(self.model)

    def outputs(self, phi: Params, x: Tensor) -> Tensor:
        """f(x; phi). In training mode the buffers in `phi` are updated in place."""
        if self._views is None:
            return self._called(phi, x)
        with self._views:
            outputs = self._called(phi, x)
        if not self._views.asked:  # by its first call, nor by any other: each operation takes longer within
            self._views = None
        return outputs

    def _called(self, phi: Params, x: Tensor) -> Tensor:
        if phi is self._held:
            return self.model(x)
        return torch.func.functional_call(self.model, {**phi, **self._counting}, (x,))

    def predict(self, model: Predictive, x: Tensor) -> Tensor:
        """Outputs of a mixture: log-probabilities for classes, means for regression; of one model as they are."""
        outputs = []
        for phi in model.models:
            with self.holding(phi):
                outputs.append(self.outputs(phi, x))
        if len(outputs) == 1:
            return outputs[0]
        if self.loss.mix is None:
            raise ValueError(
                f"the loss {self.loss} does not say how the outputs of {len(outputs)} models are mixed: "
                "write fedprior.Loss(log_lik, mix=...)"
            )
        return self.loss.mix(torch.stack(outputs), outputs[0].new_tensor(model.weights))

    def log_lik(self, phi: Params, x: Tensor, y: Tensor) -> Tensor:
        """Mean log-likelihood per example of a batch, in nats; an E-step's gradient comes from here."""
        return self.loss.of_batch(self.outputs(phi, x), y)

    @property
    def recordable(self) -> bool:
        """May its gradients be recorded? Not with a loss or with layers of the user's own."""
        return any(self.loss is known for known in LOSSES.values()) and self._plain

    @cached_property
    def _plain(self) -> bool:
        return may_be_recorded(self.model)

    def recorded(self, name: str, function: Function) -> Function:
        """`function`, which reads nothing that changes but its tensors, recorded under `name` where that may be."""
        return self._recorded.setdefault(name, Programs(function)) if self.recordable else function

    def gradients(self, names: Sequence[str]) -> Function:
        """(x, y, *values of phi) -> the gradients of minus `log_lik` for the parameters `names`, in training mode.

        The values are in the order of `every`.
        """

        def function(x: Tensor, y: Tensor, *values: Tensor) -> tuple[Tensor | None, ...]:
            phi = {k: v.detach() for k, v in zip(self.every, values, strict=True)}
            value = self.log_lik(phi | {k: phi[k].requires_grad_() for k in names}, x, y)
            return torch.autograd.grad(value, [phi[k] for k in names], value.new_tensor(-1.0), allow_unused=True)

        return self.recorded(" ".join(names), function)

    def cut(self, cut: Cut) -> Objective:
        """The same objective over what is left of the model; the newest one is remembered."""
        if not cut.removed:
            return self
        if self._smaller is None or self._smaller[0] != cut:
            if self._smaller is not None:
                self._smaller[1]._recorded.clear()  # they hold the one before, which would be freed late
            smaller = Objective(slim(self.model, cut), self.loss)
            smaller.made_by = cut
            self._smaller = cut, smaller
        return self._smaller[1]

    def with_loss(self, loss: Loss) -> Objective:
        """The same model, and another log-likelihood of its outputs."""
        other = copy.copy(self)
        other.loss, other._smaller, other._recorded = loss, None, {}
        return other

    def module(self, phi: Params) -> nn.Module:
        """A copy of the model with the parameters `phi`, in evaluation mode."""
        model = copy.deepcopy(self.model).eval()
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name in phi:
                    value.copy_(phi[name])
        return model
