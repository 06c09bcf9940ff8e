"""What travels of priors that stand side by side, as those of a Split or a Mixture do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from fedprior.priors.parts import names_of_parts


class Carried(ABC):
    """The optional attributes of a prior (algorithm.py), told of the terms and fields of each part.

    Attributes:
        own: attribute -> names of the prior's own, besides those of its parts.
    """

    own: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})

    @property
    @abstractmethod
    def beside(self) -> Sequence[Any]:
        """The parts' priors, in order."""

    @property
    def uplink(self) -> tuple[str, ...]:
        """The parts'."""
        return self._told("uplink")

    @property
    def exact(self) -> tuple[str, ...]:
        """The parts'."""
        return self._told("exact")

    @property
    def bounds(self) -> dict[str, float]:
        """The parts'."""
        told = [getattr(prior, "bounds", {}) for prior in self.beside]
        return dict(zip(names_of_parts(told), (most for bounds in told for most in bounds.values()), strict=True))

    @property
    def precise(self) -> tuple[str, ...]:
        """The parts'."""
        return self._told("precise")

    @property
    def precise_eta(self) -> tuple[str, ...]:
        """The parts'."""
        return self._told("precise_eta")

    @property
    def index(self) -> tuple[str, ...]:
        """The parts'."""
        return self._told("index")

    def _told(self, attribute: str) -> tuple[str, ...]:
        parts = names_of_parts([getattr(prior, attribute, ()) for prior in self.beside])
        return (*parts, *self.own.get(attribute, ()))
