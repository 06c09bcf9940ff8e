"""What is refused before round one: types, sizes, and a model, a loss and data that do not fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedprior import tree
from fedprior.algorithm import Algorithm
from fedprior.cohort import Availability
from fedprior.core import Client, Examples
from fedprior.data.population import Partition
from fedprior.losses import LOSSES
from fedprior.objective import Objective


def check_types(algorithm: Any, model: Any, clients: Any, availability: Any, test: Any) -> None:
    """A TypeError that says what to write instead."""
    wanted = {
        "algorithm": (algorithm, Algorithm, "an Algorithm, such as fedprior.fedavg(lr=0.05)"),
        "model": (model, nn.Module, "an instance of nn.Module, such as fedprior.models.lenet()"),
        "availability": (availability, Availability, "fedprior.Availability(dropout=...)"),
        "test": (test, Examples | None, "fedprior.Examples(x, y)"),
    }
    for name, (value, kind, advice) in wanted.items():
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} must be {advice}; got {value if isinstance(value, type) else type(value).__name__}"
            )
    if isinstance(clients, Examples) or not (hasattr(clients, "__len__") and hasattr(clients, "__getitem__")):
        raise TypeError(
            "clients must be a population, such as fedprior.data.iid(examples, 100), or a list of Client; "
            f"got {type(clients).__name__}"
        )


def check_device(device: str) -> None:
    """A device that PyTorch can put a tensor on."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {error}; device='cpu' can") from error


def check_sizes(clients: Any, seed: Any, cohort: Any, positive: Mapping[str, Any]) -> None:
    """Whole numbers that can be."""
    if len(clients) == 0:
        raise ValueError("the population has no clients")
    for name, value in {**positive, "cohort": cohort}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            limit = f"between 1 and the {len(clients)} clients" if name == "cohort" else "at least 1"
            raise ValueError(f"{name} must be {limit}, a whole number; got {value!r}")
    if cohort > len(clients):
        raise ValueError(f"cohort must be between 1 and the {len(clients)} clients, got {cohort}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}")


def check_clients(clients: Any) -> None:
    """The first client's type, and that no two of a list share an index: it seeds randomness and names states."""
    if not isinstance(clients[0], Client):
        raise TypeError(f"clients[0] must be a fedprior.Client(index, name, train), got {type(clients[0]).__name__}")
    if isinstance(clients, list | tuple) and len({c.index for c in clients}) < len(clients):
        raise ValueError("two clients of the list have the same index: give them 0, 1, 2, ...")


def check_fit(objective: Objective, clients: Any, test: Examples | None, device: str) -> None:
    """Try the first client's examples and the test set on the model and its loss; all clients have examples, labels."""
    if not objective.trainable:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to train")
    _check_sizes_of_clients(clients)
    classes = _check_examples(objective, "the first client's examples", clients[0].train, device)
    if classes is not None:
        _check_labels_of_clients(clients, classes)
    if test is not None:
        if len(test) == 0:
            raise ValueError("the test examples are empty")
        _check_examples(objective, "the test examples", test, device)
        if bad := int((~torch.isfinite(test.x)).sum()):
            raise ValueError(f"x of the test examples has {bad} NaN or infinite values: drop or fill them first")


def _check_sizes_of_clients(clients: Any) -> None:
    """No client is empty, as far as that can be seen without making one."""
    if isinstance(clients, Partition):
        empty = [clients.name(i) for i in (clients.offsets.diff() == 0).nonzero().flatten().tolist()]
    else:
        known = clients if isinstance(clients, list | tuple) else [clients[0]]
        empty = [client.name for client in known if len(client.train) == 0]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(clients)} clients have no training examples, the first is {empty[0]!r}: leave them "
            "out, clients=[c for c in clients if len(c.train)]"
        )


def _check_labels_of_clients(clients: Any, classes: int) -> None:
    """Labels are classes of the model's, as far as that can be seen without making a client."""
    if isinstance(clients, Partition):
        y = clients.examples.y[clients.index]
        wrong = ((y < 0) | (y >= classes)).reshape(len(y), -1).any(1).nonzero()[:1, 0].cpu()
        owners = (torch.bucketize(wrong, clients.offsets, right=True) - 1).tolist()
        seen = [(clients.name(i), y[clients.offsets[i] : clients.offsets[i + 1]]) for i in owners]
    else:
        seen = [(c.name, c.train.y) for c in clients] if isinstance(clients, list | tuple) else []
    for name, labels in seen:
        _check_labels(f"client {name!r}", labels, classes)


def _check_examples(objective: Objective, name: str, data: Examples, device: str) -> int | None:
    """How many classes the model knows; None if it does not classify."""
    objective.train(False)
    x, y = data.x[:2].to(device), data.y[:2].to(device)
    named = any(objective.loss is loss for loss in LOSSES.values())
    try:
        with torch.no_grad():
            outputs = objective.model(x)
            if named and not isinstance(outputs, Tensor):
                raise TypeError(f"the model must give one tensor, and gives a {type(outputs).__name__}")
            classifies = objective.loss is LOSSES["classification"] and not data.y.is_floating_point()
            if classifies:
                _check_labels(name, data.y, outputs.shape[-1])
            values = objective.loss.log_lik(outputs, y)
    except LabelError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the model and its loss do not fit {name} (x {tuple(x.shape)} {x.dtype}, y {tuple(y.shape)} {y.dtype}): "
            f"{error}"
        ) from error
    if values.shape != (len(x),):
        raise ValueError(
            f"the loss must give one log-likelihood per example, shape ({len(x)},); it gave {tuple(values.shape)} "
            "(PyTorch's losses need reduction='none' and a minus sign)"
        )
    return outputs.shape[-1] if classifies else None


class LabelError(ValueError):
    """Labels that are no class of the model's."""


def _check_labels(name: str, y: Tensor, classes: int) -> None:
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise LabelError(f"the labels of {name} run from {low} to {high}, and the model has {classes} outputs")


def identity(clients: Any) -> str:
    """Enough to notice other data or another partition: a digest of the first and last clients and of who has what."""
    ends = f"{_digest(clients[0])}, {_digest(clients[len(clients) - 1])}"
    fingerprint = getattr(clients, "fingerprint", None)
    return f"{ends}, {fingerprint()}" if fingerprint else ends


def test_identity(test: Examples | None) -> int:
    """A digest of the test set."""
    return 0 if test is None else tree.digest({"x": test.x, "y": test.y})


def _digest(client: Client) -> str:
    digest = hashlib.sha256()
    for tensor in (client.train.x, client.train.y):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{client.name}, {len(client.train)} examples, {digest.hexdigest()[:16]}"
