r"""Metrics are sums over examples, so they can be added across batches and clients.

    calibration_error = sum_b |hits_b - confidence_b| / examples     over bins of equal width of the confidence
    brier = mean_i sum_c (p_ic - [y_i = c])^2                        in [0, 2]

Confidence is the probability of the class that is predicted. Guo et al. 2017, arXiv:1706.04599; Brier 1950.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprior.core import Client, Examples, Params
from fedprior.objective import Objective
from fedprior.posteriors import Predictive
from fedprior.rng import generator, seeded_globals

Row = dict[str, float | str]
BINS = 15
FIRST, MOST, VALUES = 50, 1000, 2**19
"""Examples of the first batch on a CPU, and of the largest; values of a layer's output that stay near a processor."""
TOGETHER = 2**20  # values of the inputs of clients that are evaluated in one go: they are copied


@dataclass(frozen=True)
class Sums:
    """Totals over examples; `+` merges, `means` divides once.

    Attributes:
        totals: name -> sum over examples.
        examples: how many.
        bins: hits minus confidence, summed over the examples of each bin of the confidence, (bins,); None: not asked.
    """

    totals: Mapping[str, float]
    examples: int
    bins: Tensor | None = None

    def __add__(self, other: Sums) -> Sums:
        bins = None if self.bins is None or other.bins is None else self.bins + other.bins
        return Sums({k: v + other.totals[k] for k, v in self.totals.items()}, self.examples + other.examples, bins)

    def means(self) -> dict[str, float]:
        """Per example: nats (negative log-likelihood) and the loss's scores; and the calibration error."""
        means = {k: v / self.examples for k, v in self.totals.items()}
        return (
            means if self.bins is None else means | {"calibration_error": float(self.bins.abs().sum()) / self.examples}
        )


@torch.no_grad()
def evaluate(
    objective: Objective, phi: Params | Predictive, data: Examples, batch_size: int | None = None, bins: int = 0
) -> Sums:
    """The objective's log-likelihood and scores of `data` under phi, or under the mixture of a Predictive.

    Args:
        objective: the model and its loss.
        phi: what to predict with.
        data: at least one example.
        batch_size: examples at a time; if None, so many that what layers give stays near the processor.
        bins: of the calibration error; with 0 neither it nor the Brier score is taken. Only for classes.
    """
    if len(data) == 0:
        raise ValueError("cannot evaluate on no examples")
    parts = []
    for outputs, y in _outputs(objective, phi, data, batch_size):
        values, binned = _values(objective, outputs, y), None
        if bins:
            values["brier"], binned = _calibration(_probabilities(objective, outputs), y, bins)
        parts.append(_summed(values, len(y), binned))
    return sum(parts[1:], parts[0])


def _values(objective: Objective, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of each example."""
    scores = objective.loss.scores.items()
    return {"nats": -objective.loss.log_lik(outputs, y), **{name: score(outputs, y) for name, score in scores}}


def _summed(values: Mapping[str, Tensor], examples: int, bins: Tensor | None = None) -> Sums:
    return Sums({k: float(v.double().sum()) for k, v in values.items()}, examples, bins)


def _outputs(
    objective: Objective, phi: Params | Predictive, data: Examples, batch_size: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and targets of each batch, in evaluation mode; of the first batch, what layers give is watched."""
    objective.train(False)
    model = phi if isinstance(phi, Predictive) else Predictive.point(phi)
    device = next(iter(model.models[0].values())).device
    if device.type == "cpu" and objective.channels_last:
        model = Predictive(model.weights, tuple(map(_channels_last, model.models)))
    size = batch_size or (FIRST if device.type == "cpu" else MOST)
    done, watches = 0, batch_size is None and device.type == "cpu"
    with seeded_globals(generator(0, "evaluate"), device):  # for layers that always draw
        while done < len(data):
            x, y = data.x[done : done + size], data.y[done : done + size]
            with _watched(objective.model if watches else None) as given:
                outputs = objective.predict(model, x.to(device))
            if watches:
                size, watches = max(1, min(MOST, VALUES * len(x) // max([1, *given]))), False
            done += len(x)
            yield outputs, y.to(device)


def _channels_last(phi: Params) -> Params:
    """The same values, and filters as the fastest convolutions want them."""
    return {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in phi.items()}


@contextmanager
def _watched(model: nn.Module | None) -> Iterator[list[int]]:
    """How many values each call of a layer gives."""
    given: list[int] = []

    def see(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # recurrent layers give several, and work on one position at a time
            given.append(output.numel())

    hooks = [layer.register_forward_hook(see) for layer in (model.modules() if model else ())]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _probabilities(objective: Objective, outputs: Tensor) -> Tensor:
    if objective.loss.probabilities is None:
        raise ValueError(f"the loss {objective.loss} has no classes: calibration and entropy need probabilities")
    return objective.loss.probabilities(outputs).double()


def _calibration(p: Tensor, y: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Each example's Brier score, and hits minus confidence in each bin; positions of a sequence are averaged."""
    confidence, predicted = p.max(-1)
    gap = (predicted == y).double() - confidence
    squares = (p - F.one_hot(y, p.shape[-1])).square().sum(-1)
    # the bins are ]0, 1/bins], ]1/bins, 2/bins], ...
    place = (torch.ceil(confidence * bins).long() - 1).clamp(0, bins - 1)
    sums = gap.new_zeros(bins).index_add(0, place.flatten(), gap.flatten())
    return squares.reshape(len(y), -1).mean(1), (sums / y[0].numel()).cpu()


def _held_out(client: Client) -> tuple[Examples, str]:
    """The examples that a client is evaluated on, and what they are."""
    held = client.held_out
    return (client.train, "training") if held is None or len(held) == 0 else (held, "held_out")


@torch.no_grad()
def evaluate_clients(objective: Objective, phi: Params, clients: Iterable[Client]) -> list[Row]:
    """One row a client: means over its held-out examples, or over its training examples if it has none.

    Small clients share batches.
    """
    rows: list[Row] = []
    for group in _together(clients):
        sizes = [len(data) for _, data, _ in group]
        x, y = (_joined([getattr(data, part) for _, data, _ in group]) for part in ("x", "y"))
        parts = [_values(objective, *outputs) for outputs in _outputs(objective, phi, Examples(x, y), None)]
        values = {k: torch.cat([part[k] for part in parts]).split(sizes) for k in parts[0]}
        for place, (client, data, on) in enumerate(group):
            row: Row = {"client": client.name, "examples": len(data), "on": on}
            rows.append(row | _summed({k: v[place] for k, v in values.items()}, len(data)).means())
    return rows


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _together(clients: Iterable[Client]) -> Iterator[list[tuple[Client, Examples, str]]]:
    """Clients, their examples, and what those are: neighbours of one kind, up to `TOGETHER` values or one client."""
    group: list[tuple[Client, Examples, str]] = []
    kind, room = None, 0
    for client in clients:
        data, on = _held_out(client)
        if len(data) == 0:
            raise ValueError(f"cannot evaluate client {client.name!r}: it has no examples")
        own = [(v.shape[1:], v.dtype, v.device) for v in (data.x, data.y)]
        if group and (own != kind or data.x.numel() > room):
            yield group
            group = []
        room = (room if group else TOGETHER) - data.x.numel()
        kind = own
        group.append((client, data, on))
    if group:
        yield group


def before_and_after(objective: Objective, before: tuple[Objective, Params], after: Predictive, client: Client) -> Row:
    """A client's row: means over its held-out examples (else training examples) before and after it has adapted.

    Args:
        objective: of the full model.
        before: what the client receives; a smaller model, maybe.
        after: its predictive.
        client: whose examples they are.
    """
    data, on = _held_out(client)
    bins = BINS if objective.loss.probabilities else 0
    row: Row = {"client": client.name, "examples": len(data), "on": on}
    row |= {f"before_{k}": v for k, v in evaluate(*before, data, bins=bins).means().items()}
    return row | {f"after_{k}": v for k, v in evaluate(objective, after, data, bins=bins).means().items()}


def over_clients(rows: Sequence[Mapping[str, float | str]]) -> dict[str, dict[str, float]]:
    """Every number of the rows -> its mean, standard deviation, median and worst decile over clients.

    The worst decile is the value that a tenth of the clients do not do better than: low for accuracies, high for
    all other metrics. Every client counts once, however many examples it has.
    """
    columns = [k for k, v in rows[0].items() if isinstance(v, float)] if rows else []
    return {k: _spread(torch.tensor([float(row[k]) for row in rows], dtype=torch.float64), k) for k in columns}


def by_seen(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of Result.personalised by kind of client, for over_clients; a kind without clients is left out.

    A "seen" client took part in a round; from the examples of an "unseen" one the federation has learned nothing.
    """
    kinds = {kind: [row for row in rows if row["seen"] == said] for kind, said in (("seen", "yes"), ("unseen", "no"))}
    return {kind: some for kind, some in kinds.items() if some}


def _spread(values: Tensor, name: str) -> dict[str, float]:
    numbers = {"mean": values.mean(), "std": values.std(correction=0), "median": values.quantile(0.5)}
    numbers["worst_decile"] = values.quantile(0.1 if name.endswith("accuracy") else 0.9)
    return {k: float(v) for k, v in numbers.items()}


@torch.no_grad()
def entropies(objective: Objective, phi: Params | Predictive, data: Examples, batch_size: int | None = None) -> Tensor:
    """Entropy of p(y | x) of each example, in nats, (examples,); summed over positions of a sequence."""
    p = [_probabilities(objective, outputs) for outputs, _ in _outputs(objective, phi, data, batch_size)]
    return torch.cat([torch.special.entr(q).reshape(len(q), -1).sum(1) for q in p]).cpu()


def ood_auroc(objective: Objective, phi: Params | Predictive, inside: Examples, outside: Examples) -> float:
    """How well the predictive's entropy tells foreign examples from one's own: 0.5 is chance, 1 is always."""
    return auroc(entropies(objective, phi, inside), entropies(objective, phi, outside))


def auroc(negative: Tensor, positive: Tensor) -> float:
    """P(a positive's score is higher than a negative's) + P(they are equal) / 2; scores (n,) and (m,)."""
    if len(negative) == 0 or len(positive) == 0:
        raise ValueError(f"auroc needs scores of both kinds, got {len(negative)} and {len(positive)}")
    ordered = negative.sort().values
    below, not_above = (torch.searchsorted(ordered, positive, right=right).double() for right in (False, True))
    return float((below + not_above).mean()) / (2 * len(ordered))
