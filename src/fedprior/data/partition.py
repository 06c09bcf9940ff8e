r"""Partitions of examples into clients: each example goes to exactly one client.

    iid        sizes equal up to one, at random
    dirichlet  p_c ~ Dir(alpha, ..., alpha) over the S clients for each label c, and client s gets
               the share p_cs of label c: E p_cs = 1/S, Var p_cs = (1/S)(1 - 1/S) / (S alpha + 1).
               Small alpha: few labels a client, unequal sizes. Redrawn until all have min_examples
               (Yurochkin et al. 2019, arXiv:1905.12022; NIID-Bench, Li et al., arXiv:2102.02079)
    shards     sorted by label, cut into S * shards_per_client runs of one size (up to one), which
               are dealt out at random (McMahan et al. 2017, arXiv:1602.05629)
    by_key     one client per key: a speaker, a patient, a hospital

Each draws from a generator of its own made of (seed, scheme): the same seed is the same partition.
`holdout` is the fraction of each client's examples, chosen at random, that is put aside as
`Client.held_out`; it does not change which examples a client has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fedprior.core import Examples
from fedprior.data.population import Partition
from fedprior.data.sources import as_keys

_DRAWS = 1000


def iid(examples: Examples, clients: int, seed: int = 0, holdout: float = 0.0) -> Partition:
    """Clients of equal size (up to one example), drawn at random."""
    rng = _generator(seed, 0)
    _check(examples, clients, clients)
    owner = rng.permutation(np.arange(len(examples)) % clients)
    return _deal(examples, owner, clients, rng, holdout)


def dirichlet(
    examples: Examples,
    clients: int,
    alpha: float,
    seed: int = 0,
    min_examples: int = 1,
    holdout: float = 0.0,
) -> Partition:
    """Each label is split between the clients in Dirichlet(alpha) proportions."""
    rng = _generator(seed, 1)
    _check(examples, clients, clients * min_examples)
    if not 0 < alpha <= 1e9:
        raise ValueError(f"alpha must be in (0, 1e9], got {alpha}; use iid for no label skew")
    labels = _labels(examples, "dirichlet")
    owner = np.empty(len(labels), np.int64)
    for label, row in enumerate(_shares(np.bincount(labels), clients, alpha, min_examples, rng)):
        owner[labels == label] = rng.permutation(np.repeat(np.arange(clients), row))
    return _deal(examples, owner, clients, rng, holdout)


def shards(
    examples: Examples,
    clients: int,
    shards_per_client: int = 2,
    seed: int = 0,
    holdout: float = 0.0,
) -> Partition:
    """Each client gets runs of the examples sorted by label: about one label a run."""
    rng = _generator(seed, 2)
    if shards_per_client < 1:
        raise ValueError(f"shards_per_client must be at least 1, got {shards_per_client}")
    total = clients * shards_per_client
    _check(examples, clients, total)
    shuffled = rng.permutation(len(examples))
    order = shuffled[np.argsort(_labels(examples, "shards")[shuffled], kind="stable")]
    owner = np.empty_like(order)
    run = np.arange(len(order)) * total // len(order)
    owner[order] = rng.permutation(total)[run] % clients
    return _deal(examples, owner, clients, rng, holdout)


def by_key(examples: Examples, keys: Sequence[object] | None = None, seed: int = 0, holdout: float = 0.0) -> Partition:
    """One client per key (default: `examples.keys`), named by it, in the sorted order of keys."""
    rng = _generator(seed, 3)
    _check(examples, 1, 1)
    owners = examples.keys if keys is None else keys
    if owners is None:
        raise ValueError("no keys: give by_key(keys=[...]), one per example, or from_csv(client=...)")
    if isinstance(owners, str):
        raise ValueError(
            f"keys are one per example, got the text {owners!r}; a column's name goes to from_csv(client=...)"
        )
    owners = as_keys(owners)
    if len(owners) != len(examples):
        raise ValueError(f"there are {len(examples)} examples and {len(owners)} keys")
    names = tuple(sorted(set(owners)))
    place = {name: i for i, name in enumerate(names)}
    owner = np.fromiter((place[key] for key in owners), np.int64, len(owners))
    return replace(_deal(examples, owner, len(names), rng, holdout), names=names)


def _deal(examples: Examples, owner: np.ndarray, clients: int, rng: np.random.Generator, holdout: float) -> Partition:
    """A Partition from each example's client, every client's examples in random order."""
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is a fraction of a client's examples, in [0, 1); got {holdout}")
    shuffled = rng.permutation(len(owner))
    index = shuffled[np.argsort(owner[shuffled], kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=clients))])
    return Partition(examples, torch.from_numpy(index), torch.from_numpy(offsets), holdout)


def _shares(totals: np.ndarray, clients: int, alpha: float, min_examples: int, rng: np.random.Generator) -> np.ndarray:
    """Examples of each label for each client, shape (labels, clients); row sums are `totals`."""
    for _ in range(_DRAWS):
        shares = rng.dirichlet(np.full(clients, alpha), size=len(totals))
        cuts = np.rint(np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
        cuts[:, -1] = totals
        counts = np.diff(cuts, axis=1, prepend=0)
        if counts.sum(axis=0).min() >= min_examples:
            return counts
    raise ValueError(
        f"no draw of {_DRAWS} at alpha={alpha} gave each of {clients} clients {min_examples} "
        "examples; take fewer clients, a larger alpha, or min_examples=0, and leave the empty clients out of the run"
    )


def _labels(examples: Examples, scheme: str) -> np.ndarray:
    """The label of each example as 0, 1, ... in the order of the labels, shape (examples,)."""
    y = examples.y
    if y.ndim != 1 or y.is_floating_point() or y.is_complex():
        raise ValueError(
            f"{scheme} needs one integer label per example; use iid or by_key for y of "
            f"{y.dtype} and shape {tuple(y.shape)}"
        )
    return np.unique(y.cpu().numpy(), return_inverse=True)[1]


def _check(examples: Examples, clients: int, needed: int) -> None:
    if not isinstance(examples, Examples):
        raise TypeError(
            "examples must be fedprior.Examples, such as fedprior.data.from_arrays(x, y); "
            f"got {type(examples).__name__}"
        )
    if clients < 1:
        raise ValueError(f"a partition needs at least 1 client, got clients={clients}")
    if needed > len(examples):
        raise ValueError(f"{clients} clients need {needed} examples, and there are {len(examples)}")


def _generator(seed: int, scheme: int) -> np.random.Generator:
    if seed < 0:
        raise ValueError(f"a seed is a whole number from 0 up, got {seed}")
    return np.random.default_rng([seed, scheme])
