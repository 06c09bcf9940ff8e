"""An eta that has the shapes of the slim model: `mean` and `gain` of what is left, and `keep`, which says what that is.

keep    group -> (units,), 0 or 1, of the full model         mean, gain    as slim.py's gather and units leave them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedprior.codecs import PayloadError
from fedprior.core import Eta, Params
from fedprior.slim import Cut
from fedprior.structure import Group


def between(groups: tuple[Group, ...], keep: Params, fewer: Params) -> Cut:
    """What `fewer` leaves of the slim model that `keep` leaves."""
    whole = Cut.of(groups, keep)
    return Cut.of(whole.small_groups, whole.units(fewer))


def sized(groups: tuple[Group, ...], like: Any, index: Mapping[str, Tensor]) -> Any:
    """An eta without values (meta tensors), in the shapes that gates leave; a PayloadError for what are no gates.

    Args:
        groups: of the full model.
        like: any eta of this model.
        index: "keep/group" -> (units,).
    """
    keep = {g.name: index[f"keep/{g.name}"] for g in groups}
    for name, z in keep.items():
        if not bool(((z == 0) | (z == 1)).all() & z.any()):
            raise PayloadError(f"keep/{name}: gates are 0 or 1, and one at least is open")
    cut = Cut.of(groups, keep)

    def empty(value: Tensor, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=value.dtype, device="meta")

    mean = {name: empty(value, cut.shape(name, value.shape)) for name, value in like.mean.items()}
    gain = {name: empty(value, [len(cut.kept[name])]) for name, value in like.gain.items()}
    return like._replace(mean=mean, keep=keep, gain=gain)


def follow(groups: tuple[Group, ...], before: Eta, after: Eta, state: Params) -> Params:
    """Tensors like those of `before`, to whose names theirs end, in the shapes of `after`."""
    if before.keep is after.keep:
        return state
    cut, moved = between(groups, before.keep, after.keep), dict(state)
    for field, take in (("mean", cut.gather), ("gain", cut.units)):
        for key, value in state.items():
            _, found, name = key.partition(f"{field}/")
            if found and name in getattr(before, field):
                moved[key] = take({name: value})[name]
    return moved
