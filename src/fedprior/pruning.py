r"""Magnitude pruning: a trained model without its weakest units (filters, neurons, attention heads).

    score_u = |w_u| / mean_v |w_v|      w_u: the entries that unit u owns; v: all units of its group

Units go in the order of their scores, lowest first, with what reads them, until what is left is at most density times
all parameters. The unit with the highest score of each group stays. Scores are those of the whole model.

Li et al. 2017, arXiv:1608.08710 (norms, within one layer); Fang et al. 2023, arXiv:2301.12900 (relative to the group's
mean). Without a scale of its own per group, layers of many small weights would go first, down to their last unit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn

from fedprior import structure, tree
from fedprior.core import Params
from fedprior.slim import Cut, removable, slim
from fedprior.structure import Group

Ranking = Sequence[tuple[str, int]]


def prune(model: nn.Module, density: float, x: Tensor) -> nn.Module:
    """A smaller copy of a trained model: to evaluate, or to give to `run` as the model that is fine-tuned.

    Args:
        model: for instance result.model(); it is not changed.
        density: parameters left / parameters, in (0, 1]; the copy has at most that, by less than one unit.
        x: example inputs, shape (n, ...), from which the units are found.

    Raises:
        ModuleNotFoundError: if torch-pruning is not installed.
        ValueError: if the density cannot be met with one unit left of each group, or no unit can be removed.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], a fraction of the parameters; got {density}")
    groups = removable(model, x)
    params = {name: p.detach() for name, p in model.named_parameters()}
    order, count = weakest_first(groups, params), tree.size(params)

    def left(removed: int) -> int:
        return tree.size(_without(groups, order[:removed]).gather(params))

    removed = bisect_left(range(len(order) + 1), True, key=lambda n: left(n) / count <= density)
    if removed > len(order):
        smallest = left(len(order))
        possible = ceil(1e6 * smallest / count) / 1e6
        raise ValueError(
            f"density={density} asks for at most {density * count:.0f} of {count} parameters, and one unit of each "
            f"group and all layers without units have {smallest}: ask for density >= {possible:g}"
        )
    return slim(model, _without(groups, order[:removed]))


def weakest_first(groups: Sequence[Group], params: Params) -> Ranking:
    """(group, unit) by rising score, without the unit of each group that always stays."""
    norms = tree.map(torch.sqrt, structure.sums(groups, tree.map(torch.square, params)))
    scored = []
    for name, norm in norms.items():
        score, best = (norm / norm.mean().clamp(min=torch.finfo(norm.dtype).tiny)).tolist(), int(norm.argmax())
        scored += [(value, (name, unit)) for unit, value in enumerate(score) if unit != best]
    return [unit for _, unit in sorted(scored, key=lambda pair: pair[0])]


def _without(groups: tuple[Group, ...], removed: Ranking) -> Cut:
    gone = set(removed)
    return Cut(groups, {g.name: tuple(u for u in range(g.units) if (g.name, u) not in gone) for g in groups})
