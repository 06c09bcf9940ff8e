r"""Clusters that each have gates of their own: a mixture of priors whose units live and die.

    z_s ~ share,   phi_s | z_s = k ~ SharedGates(eta_k)          eta_k = (w_k, z_k, ...): weights and a mask

Each component has the density that is asked for, and chooses its units by the gains of its own clients alone: clusters
that look at other inputs keep other units. A component that no client chose in a round shrinks on time, by the gains
that it remembers. A client sends K slots, all of them zero but its own: the codec Sparse leaves out what is zero, so
that a message is about as long as that of one sparse model.

A composition of mixture.py (IFCA: Ghosh et al. 2020, arXiv:2006.04088) and shared_gates.py (FedSparse: Louizos et al.
2021, arXiv:2111.10192); ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from fedprior import tree
from fedprior.core import Eta, Params, Stats
from fedprior.priors.components import each, most
from fedprior.priors.mixture import Mixture
from fedprior.priors.parts import join_etas, join_stats, part_etas
from fedprior.priors.shared_gates import SharedGates
from fedprior.slim import Cut
from fedprior.structure import Group


@dataclass(frozen=True)
class SparseMixture(Mixture):
    """K sets of gates that the server decides by evidence.

    Attributes:
        prior: of each component; it has a density, of every component's model.
    """

    components: int = 2
    prior: SharedGates = field(default_factory=lambda: SharedGates(0.1))
    no_place = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.prior, SharedGates) or self.prior.density is None:
            raise ValueError(f"SparseMixture needs a prior SharedGates(density=...) with a density, got {self.prior}")

    def scheduled(self, rounds: int) -> Self:
        """The same prior with a schedule for a run of so many rounds."""
        return replace(self, prior=self.prior.scheduled(rounds))

    @property
    def density(self) -> float | None:
        """Of each component."""
        return self.prior.density

    @property
    def groups(self) -> tuple[Group, ...]:
        """The model's units."""
        return self.prior.groups

    @property
    def counted(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters that a density counts."""
        return self.prior.counted

    def cut(self, eta: Eta) -> Cut:
        """What is left of the component with most clients."""
        return self.prior.cut(most(eta))

    def left(self, eta: Eta) -> Params:
        """The weights of what is left of it."""
        return self.prior.left(most(eta))

    def sized(self, like: Eta, index: Params) -> Eta:
        """An eta without values, in the shapes that these gates leave of each component."""
        of = [{key.removeprefix(f"part{k}_"): z for key, z in index.items()} for k in range(self.components)]
        return join_etas([self.prior.sized(*part) for part in zip(part_etas(like), of, strict=True)], share=like.share)

    def follow(self, before: Eta, after: Eta, state: Params) -> Params:
        """Each component's of the server step's state."""
        for k, parts in enumerate(zip(part_etas(before), part_etas(after), strict=True)):
            own = {key: v for key, v in state.items() if f"part{k}_" in key.rpartition("/")[0]}
            state = state | self.prior.follow(*parts, own)
        return state

    def accept(self, eta: Eta, t: Stats) -> Stats:
        """The statistics of a client; a PayloadError for gains that no E-step finds."""
        for part, own in each(eta, t):
            self.prior.accept(part, own)
        return t

    def reference(self, eta: Eta, sent: Stats) -> Stats:
        """pi_k w_k: the differences pi_k (phi_k - w_k) are zero for all components but the client's."""
        parts = [Stats({"phi": tree.map(lambda w, n=own.clients: n * w, part.mean)}) for part, own in each(eta, sent)]
        return Stats(join_stats(parts).terms, sent.clients)

    def project(self, eta: Eta, before: Eta) -> Eta:
        """Each component's: remember gains, remove units."""
        return self._mapped(self.prior.project, eta, before)

    def idle(self, eta: Eta) -> Eta:
        """A round from which nothing arrived, for each component."""
        return self._mapped(self.prior.idle, eta)

    def _mapped(self, function: Callable[..., Any], eta: Eta, *more: Eta) -> Eta:
        return join_etas(
            [function(*parts) for parts in zip(*map(part_etas, (eta, *more)), strict=True)], share=eta.share
        )
