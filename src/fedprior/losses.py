"""What the outputs of a model mean: the log-likelihood of one example, in nats, and the scores beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PerExample = Callable[[Tensor, Tensor], Tensor]
"""(outputs (n, ...), targets (n, ...)) -> (n,)."""


@dataclass(frozen=True)
class Loss:
    """What the outputs of a model mean.

    Attributes:
        log_lik: log-likelihood of each example in nats, (outputs, targets) -> (n,).
        scores: further quantities whose mean over examples is reported, e.g. accuracy.
        mean: what log_lik(outputs, targets).mean() is, a scalar, where one call of PyTorch's gives it; else None.
        mix: outputs of k models (k, n, ...), and their weights (k,), with sum 1 -> outputs (n, ...) of the mixture.
        probabilities: outputs -> probabilities of the classes, in the last dimension, where targets are classes.
    """

    log_lik: PerExample
    scores: Mapping[str, PerExample] = field(default_factory=dict)
    mean: PerExample | None = None
    mix: Callable[[Tensor, Tensor], Tensor] | None = None
    probabilities: Callable[[Tensor], Tensor] | None = None

    def of_batch(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The mean log-likelihood per example, a scalar."""
        return self.log_lik(outputs, y).mean() if self.mean is None else self.mean(outputs, y)

    def __str__(self) -> str:
        return getattr(self.log_lik, "__qualname__", type(self.log_lik).__name__)


def _categorical(logits: Tensor, y: Tensor) -> Tensor:
    """Class logits (n, classes), or (n, positions, classes), whose positions are summed."""
    _check_classes(logits, y)
    if logits.ndim == 2:
        return -F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape).flatten(1).sum(1)


def _mean_categorical(logits: Tensor, y: Tensor) -> Tensor:
    _check_classes(logits, y)
    if logits.ndim == 2:
        return -F.cross_entropy(logits, y)
    return -F.cross_entropy(logits.flatten(0, -2), y.flatten()) * math.prod(y.shape[1:])


def _check_classes(logits: Tensor, y: Tensor) -> None:
    if y.is_floating_point() or y.shape != logits.shape[:-1]:
        raise ValueError(
            f"classification needs int64 class indices of shape {tuple(logits.shape[:-1])}, got {y.dtype} of shape "
            f"{tuple(y.shape)}; write y.argmax(1) for one-hot labels, loss='regression' for numbers, "
            "loss='autoencoder' for reconstructions"
        )


def _hits(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(-1) == y).to(torch.float32).flatten(1 if y.ndim > 1 else 0).reshape(len(y), -1).mean(1)


def _mix_classes(logits: Tensor, weights: Tensor) -> Tensor:
    """Log-probabilities of the mixture: logits like any others."""
    log_weights = weights.log().view(-1, *[1] * (logits.ndim - 1))
    return torch.logsumexp(F.log_softmax(logits, -1) + log_weights, 0)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _mix_means(outputs: Tensor, weights: Tensor) -> Tensor:
    """The mixture's mean."""
    return torch.tensordot(weights, outputs, 1)


def _squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    if outputs.shape != y.shape:
        raise ValueError(
            f"outputs have shape {tuple(outputs.shape)} and targets {tuple(y.shape)}: give both the same shape"
        )
    return (outputs - y).square().reshape(len(y), -1).sum(1)


def _gaussian(outputs: Tensor, y: Tensor) -> Tensor:
    """Unit variance, without the constant."""
    return -0.5 * _squared_error(outputs, y)


def _reconstruction_errors(outputs: Tensor, x: Tensor) -> Tensor:
    """|x - reconstruction_k|^2, (n, K), from (n, K, ...) or, for one, (n, ...)."""
    wanted = x.reshape(len(x), -1)
    stacked = outputs.ndim == 3 and outputs.shape[2] == wanted.shape[1]
    if not wanted.is_floating_point() or len(outputs) != len(x) or not (stacked or outputs.numel() == wanted.numel()):
        raise ValueError(
            f"an autoencoder's targets are its inputs: outputs of shape {tuple(outputs.shape)} reconstruct no targets "
            f"of {x.dtype} and shape {tuple(x.shape)}; write clients=fedprior.data.autoencoding(clients)"
        )
    return (outputs.reshape(len(x), -1, wanted.shape[1]) - wanted[:, None]).square().sum(2)


def _reconstruction(outputs: Tensor, x: Tensor) -> Tensor:
    """Unit variance, without the constant: the sum over an example's reconstructions."""
    return -0.5 * _reconstruction_errors(outputs, x).sum(1)


def _reconstruction_error(outputs: Tensor, x: Tensor) -> Tensor:
    """The mean over an example's reconstructions."""
    return _reconstruction_errors(outputs, x).mean(1)


LOSSES: Mapping[str, Loss] = {
    "classification": Loss(_categorical, {"accuracy": _hits}, _mean_categorical, _mix_classes, _probabilities),
    "regression": Loss(_gaussian, {"squared_error": _squared_error}, mix=_mix_means),
    "autoencoder": Loss(_reconstruction, {"squared_error": _reconstruction_error}, mix=_mix_means),
}


def as_loss(loss: str | Loss | PerExample) -> Loss:
    """A name of LOSSES, a Loss, or a bare per-example log-likelihood."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}, or pass a fedprior.Loss")
        return LOSSES[loss]
    if isinstance(loss, nn.modules.loss._Loss):
        raise TypeError(
            f"{type(loss).__name__} is to be minimised; a fedprior loss is a log-likelihood of each example. "
            "Write for instance loss=lambda o, y: -F.cross_entropy(o, y, reduction='none')"
        )
    return loss if isinstance(loss, Loss) else Loss(loss)
