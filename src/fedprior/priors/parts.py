"""What Split and Mixture are made of: names by pattern, posteriors of some names, etas and statistics side by side."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from torch import nn

from fedprior import posteriors
from fedprior.core import Eta, Params, Stats

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def globs(pattern: str, model: nn.Module) -> tuple[str, ...]:
    """The names that `@head` and `@norm` stand for; any other pattern itself."""
    if not pattern.startswith("@"):
        return (pattern,)
    own = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    roles = {
        "@head": own[-1:],
        "@norm": [name for name, module in model.named_modules() if isinstance(module, _NORMS)],
    }
    if pattern not in roles:
        raise ValueError(f"unknown pattern {pattern!r}: write a glob such as 'head.*', or one of {', '.join(roles)}")
    if not roles[pattern]:
        raise ValueError(f"the pattern {pattern!r} names no layer of {type(model).__name__}: write a glob instead")
    return tuple(f"{name}.*" if name else "*" for name in roles[pattern])


@lru_cache(maxsize=64)
def assigned(patterns: tuple[tuple[str, ...], ...], names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The names of each part: every name goes to the first part with a glob that matches it."""
    parts: list[list[str]] = [[] for _ in patterns]
    for name in names:
        hits = [own for own, some in zip(parts, patterns, strict=True) if any(fnmatchcase(name, glob) for glob in some)]
        if not hits:
            raise ValueError(f"Split: no pattern matches {name!r}; write '*' as the last pattern for what is left")
        hits[0].append(name)
    return tuple(map(tuple, parts))


def check_place(prior: Any, methods: Iterable[str], place: str) -> None:
    """A TypeError for a prior with methods for which there is no place."""
    if unfit := [method for method in methods if hasattr(prior, method)]:
        raise TypeError(f"{type(prior).__name__} needs a whole model ({', '.join(unfit)}), not {place}")


def take(params: Mapping[str, Any], names: Iterable[str]) -> Params:
    """Those of `names` that there are."""
    return {name: params[name] for name in names if name in params}


class PartOf:
    """A posterior as one part sees it: its moments of the parameters `names`, and nothing else."""

    def __init__(self, q: Any, names: Sequence[str]) -> None:
        self._q, self._names = q, names

    def mean(self) -> Params:
        """E[phi] of the names."""
        return take(self._q.mean(), self._names)

    def second_moment(self) -> Params:
        """E[phi^2] of the names, elementwise."""
        return take(self._q.second_moment(), self._names)


class Moments:
    """What a part may read of a posterior: a TypeError for anything else."""

    def __init__(self, phi: Params, reader: str) -> None:
        self._q, self._reader = posteriors.Point(phi), reader

    def mean(self) -> Params:
        """phi."""
        return self._q.mean()

    def second_moment(self) -> Params:
        """Its squares."""
        return self._q.second_moment()

    def __getattr__(self, name: str) -> Any:
        raise TypeError(
            f"{self._reader} reads {name!r} of a posterior, and a part of a Split has mean() and second_moment() only: "
            "use it for the whole model, or write Gaussian() for this part"
        )


def join_etas(etas: Sequence[Eta], **more: Params) -> Eta:
    """One NamedTuple: part{i}_FIELD, and fields of its own."""
    joint: Any = _joint(tuple(type(eta) for eta in etas), tuple(more))
    return joint(*(value for eta in etas for value in eta), *more.values())


@lru_cache(maxsize=64)
def _joint(types: tuple[Any, ...], more: tuple[str, ...]) -> type:
    fields = [*names_of_parts([kind._fields for kind in types]), *more]
    return type("Eta", (namedtuple("Eta", fields),), {"__slots__": (), "types": types})


def names_of_parts(names: Sequence[Iterable[str]]) -> tuple[str, ...]:
    """part{i}_NAME for each of the names of each part."""
    return tuple(f"part{i}_{name}" for i, own in enumerate(names) for name in own)


def part_etas(eta: Eta) -> list[Eta]:
    """The inverse of `join_etas`."""
    values = iter(eta)
    return [kind(*(next(values) for _ in kind._fields)) for kind in type(eta).types]


def join_stats(parts: Sequence[Stats]) -> Stats:
    """The statistics of one posterior's parts: part{i}_TERM."""
    terms = {f"part{i}_{term}": t[term] for i, t in enumerate(parts) for term in t.terms}
    return Stats(terms, parts[0].clients)


def part_stats(t: Stats, index: int) -> Stats:
    """Those of part `index`."""
    prefix = f"part{index}_"
    terms = {term.removeprefix(prefix): t[term] for term in t.terms if term.startswith(prefix)}
    return Stats(terms, t.clients)
