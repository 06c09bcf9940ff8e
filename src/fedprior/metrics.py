r"""Metrics are sums over examples, so they can be added across batches and clients.

    calibration_error = sum_b |hits_b - confidence_b| / examples     over bins of equal width of the confidence
    brier = mean_i sum_c (p_ic - [y_i = c])^2                        in [0, 2]

Confidence is the probability of the class that is predicted. Guo et al. 2017, arXiv:1706.04599; Brier 1950.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprior.core import Client, Examples, Params
from fedprior.objective import Objective
from fedprior.posteriors import Predictive
from fedprior.rng import generator, seeded_globals

Row = dict[str, float | str]
BINS = 15


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
    objective: Objective, phi: Params | Predictive, data: Examples, batch_size: int = 1000, bins: int = 0
) -> Sums:
    """The objective's log-likelihood and scores of `data` under phi, or under the mixture of a Predictive.

    Args:
        objective: the model and its loss.
        phi: what to predict with.
        data: at least one example.
        batch_size: examples at a time.
        bins: of the calibration error; with 0 neither it nor the Brier score is taken. Only for classes.
    """
    if len(data) == 0:
        raise ValueError("cannot evaluate on no examples")
    model = phi if isinstance(phi, Predictive) else Predictive.point(phi)
    parts = []
    for outputs, y in _outputs(objective, model, data, batch_size):
        values = {"nats": -objective.loss.log_lik(outputs, y)}
        values |= {name: score(outputs, y) for name, score in objective.loss.scores.items()}
        binned = None
        if bins:
            values["brier"], binned = _calibration(_probabilities(objective, outputs), y, bins)
        parts.append(Sums({k: float(v.double().sum()) for k, v in values.items()}, len(y), binned))
    return sum(parts[1:], parts[0])


def _outputs(
    objective: Objective, model: Predictive, data: Examples, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and targets of each batch, in evaluation mode."""
    objective.train(False)
    device = next(iter(model.models[0].values())).device
    with seeded_globals(generator(0, "evaluate"), device):  # for layers that always draw
        for x, y in zip(data.x.split(batch_size), data.y.split(batch_size), strict=True):
            yield objective.predict(model, x.to(device)), y.to(device)


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


def evaluate_clients(objective: Objective, phi: Params, clients: Iterable[Client]) -> list[Row]:
    """One row a client: means over its held-out examples, or over its training examples if it has none."""
    rows: list[Row] = []
    for client in clients:
        data, on = _held_out(client)
        row: Row = {"client": client.name, "examples": len(data), "on": on}
        rows.append(row | evaluate(objective, phi, data).means())
    return rows


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


def _spread(values: Tensor, name: str) -> dict[str, float]:
    numbers = {"mean": values.mean(), "std": values.std(correction=0), "median": values.quantile(0.5)}
    numbers["worst_decile"] = values.quantile(0.1 if name.endswith("accuracy") else 0.9)
    return {k: float(v) for k, v in numbers.items()}


@torch.no_grad()
def entropies(objective: Objective, phi: Params | Predictive, data: Examples, batch_size: int = 1000) -> Tensor:
    """Entropy of p(y | x) of each example, in nats, (examples,); summed over positions of a sequence."""
    model = phi if isinstance(phi, Predictive) else Predictive.point(phi)
    p = [_probabilities(objective, outputs) for outputs, _ in _outputs(objective, model, data, batch_size)]
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
