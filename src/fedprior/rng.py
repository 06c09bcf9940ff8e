"""Randomness by name: every generator derives from (seed, names...).

Any order, engine or resumed run draws the same numbers. The global generators are left as they were found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *names: int | str) -> int:
    """A 63-bit seed from a seed and any names: generator(0, round, client, "e_step")."""
    text = "\0".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: int | str) -> torch.Generator:
    """A PyTorch generator (CPU) of its own for these names."""
    return torch.Generator().manual_seed(derive(seed, *names))


def numpy_generator(seed: int, *names: int | str) -> np.random.Generator:
    """A NumPy generator of its own for these names."""
    return np.random.default_rng(derive(seed, *names))


def noise_generator(seed: int, *names: int | str) -> np.random.Generator:
    """A NumPy generator whose state is of 256 bits: for noise that hides something, if the seed is a secret of 256."""
    text = "\0".join([str(seed), *map(str, names)])
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=32).digest(), "big"))


def module_seed(rng: torch.Generator) -> int:
    """What `seeded_globals` lends to layers that draw: one number of rng's."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=rng))


def passed_over(rng: torch.Generator) -> None:
    """Draw what `module_seed` draws, for nobody."""
    _NOBODY.random_(generator=rng)


_NOBODY = torch.empty((), dtype=torch.int64)


@contextmanager
def seeded_globals(rng: torch.Generator, device: str | torch.device = "cpu") -> Iterator[None]:
    """Layers such as dropout draw from PyTorch's global generator: lend it a seed, then give it back."""
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    seed = module_seed(rng)
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs of a CPU run as well
        if cuda:
            torch.cuda.manual_seed(seed)
        yield
