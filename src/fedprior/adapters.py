r"""Low-rank adapters: a small difference to each dense layer, which a client can have for itself.

    y = W x + b + U D x      W (out, in), b (out,) of the layer;   D (rank, in), U (out, rank) of the adapter
    at first D ~ U(-in^-1/2, in^-1/2) and U = 0: the model is the one that was given

With D and U personal and W shared, client s has the layer W + U_s D_s: its difference to the server's has rank `rank`
at most, and never travels. U, D are layers without a bias, so that all of a layer's names are NAME.base.weight,
NAME.base.bias, NAME.lora_down.weight and NAME.lora_up.weight.

    paper    code           shape                   paper    code                shape
    W_0      base.weight    (out, in)               A        lora_down.weight    (rank, in)
                                                    B        lora_up.weight      (out, rank)

Hu et al. 2021, arXiv:2106.09685 (LoRA), with alpha = rank. Ours: W is trained as well, by the federation, and D and U
belong to clients, as heads do in FedPer.
"""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedprior.rng import generator

ADAPTERS = "*lora_down.weight,*lora_up.weight"
"""The names of all adapters, for fedper(personal=...) and its like."""


class LowRank(nn.Module):
    """A dense layer and its adapter.

    Args:
        base: the layer, which becomes part of this one.
        rank: of the adapter.
        rng: for D.
        head_dim: outputs that stand and fall together, as those of a head of attention (structure.py); None for one.
    """

    def __init__(self, base: nn.Linear, rank: int, rng: torch.Generator, head_dim: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        kind = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.lora_down = nn.utils.skip_init(nn.Linear, base.in_features, rank, **kind)
        self.lora_up = nn.utils.skip_init(nn.Linear, rank, base.out_features, **kind)
        drawn = torch.rand(rank, base.in_features, generator=rng, dtype=base.weight.dtype)
        self.lora_down.weight = nn.Parameter(((2 * drawn - 1) * base.in_features**-0.5).to(base.weight.device))
        self.lora_up.weight = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.base(x) + self.lora_up(self.lora_down(x))


def low_rank(model: nn.Module, rank: int = 4, layers: str = "*", seed: int = 0) -> nn.Module:
    """A copy of a model with an adapter at each of its dense layers; its outputs are the same at first.

    Args:
        model: any module with layers of type nn.Linear (not of a subclass: those may do more).
        rank: of each adapter.
        layers: which of them, as globs of their names with commas between.
        seed: for the adapters' first values.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}; 0 is the model itself")
    model, patterns = copy.deepcopy(model), [pattern.strip() for pattern in layers.split(",")]
    dense = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    chosen = {k: layer for k, layer in dense.items() if any(fnmatchcase(k, pattern) for pattern in patterns)}
    if not chosen:
        raise ValueError(f"low_rank: no dense layer matches {layers!r}; the model has {', '.join(dense) or 'none'}")
    for name, layer in chosen.items():
        above, _, child = name.rpartition(".")
        parent = model.get_submodule(above)
        adapted = LowRank(layer, rank, generator(seed, "adapter", name), getattr(parent, "head_dim", None))
        if not name:
            return adapted
        setattr(parent, child, adapted)
    return model
