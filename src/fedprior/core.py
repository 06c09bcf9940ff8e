r"""The contracts: what a prior, an inference, a codec and an engine are, and the plain data between them.

    maximise over eta    sum_s  log ∫ p(D_s | phi_s) p(phi_s | eta) dphi_s

    client s   q_s  ≈ p(phi_s | D_s, eta)         E-step   (Inference)
               t_s  = weight_s * E_{q_s}[T(phi)]  statistics, the only thing uploaded   (Stats)
    server     t    = sum_s t_s                   (Engine)
               eta' = argmax log_prob(eta, t)     M-step   (Prior), reached by a ServerStep

    paper   code      what it is                        paper   code      what it is
    phi_s   phi       one client's parameters: Params   q_s     q         a posterior (posteriors.py)
    eta     eta       a NamedTuple of Params            T       stats     prior.stats(q)

Louizos, Reisser, Soriaga, Welling 2021, arXiv:2111.10192, section 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedprior.objective import Objective

Params = dict[str, Tensor]
"""A model's parameters (and floating-point buffers) by name, in the order of `named_parameters()`."""

Eta = Any
"""A prior's own NamedTuple, each field a Params."""


@dataclass(frozen=True)
class Stats:
    """Sums over clients of expected sufficient statistics. They add, and nothing else.

    Attributes:
        terms: name of the statistic -> Params (or per-group vectors); sums, never averages.
        clients: the sum of the weights of the clients summed here; 1.0 for one unweighted client.
    """

    terms: Mapping[str, Params]
    clients: float = 1.0

    def __getitem__(self, term: str) -> Params:
        if term not in self.terms:
            raise KeyError(
                f"no statistic {term!r}, only {', '.join(self.terms)}: does `uplink` name what m_step reads?"
            )
        return self.terms[term]

    def __add__(self, other: Stats) -> Stats:
        if self.terms.keys() != other.terms.keys():
            raise ValueError(f"cannot add statistics {sorted(other.terms)} to {sorted(self.terms)}")
        terms = {t: {k: v + other[t][k] for k, v in self[t].items()} for t in self.terms}
        return Stats(terms, self.clients + other.clients)

    def weighted(self, weight: float) -> Stats:
        """The statistics of a client that counts `weight` times."""
        terms = {t: {k: weight * v for k, v in self[t].items()} for t in self.terms}
        return Stats(terms, weight * self.clients)

    def only(self, terms: Iterable[str]) -> Stats:
        """The named terms alone: what travels."""
        if isinstance(terms, str):
            raise TypeError(f"`uplink` must be a tuple of names, got the string {terms!r}: write ({terms!r},)")
        return Stats({t: self[t] for t in terms}, self.clients)


@dataclass(frozen=True)
class Examples:
    """Labelled examples that share their first dimension.

    Attributes:
        x: inputs, shape (examples, ...).
        y: targets, shape (examples, ...); class indices are int64.
        keys: natural owner of each example (a speaker, a patient), or None.
    """

    x: Tensor
    y: Tensor
    keys: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"x has {len(self.x)} examples and y has {len(self.y)}")
        if self.keys is not None and len(self.keys) != len(self.x):
            raise ValueError(f"x has {len(self.x)} examples and keys has {len(self.keys)}")

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> Examples:
        """A copy of the examples at `index` (int64, any device), without their keys."""
        return Examples(self.x[index], self.y[index])

    def to(self, device: str | torch.device) -> Examples:
        """The same examples on `device`."""
        return Examples(self.x.to(device), self.y.to(device), self.keys)


@dataclass(frozen=True)
class Client:
    """One client: a stable index (it seeds the client's randomness), a name, and its examples."""

    index: int
    name: str
    train: Examples
    held_out: Examples | None = None


@dataclass(frozen=True)
class Gathered:
    """Where several clients' training examples are.

    Attributes:
        indices: the clients' own.
        names: theirs.
        examples: theirs, and maybe others.
        where: positions of the clients' examples among `examples`, client after client, int64.
        sizes: how many examples each client has.
    """

    indices: Sequence[int]
    names: Sequence[str]
    examples: Examples
    where: Tensor
    sizes: Sequence[int]

    def part(self, rows: Sequence[int]) -> Gathered:
        """Some of the clients."""
        if list(rows) == list(range(len(self.sizes))):
            return self
        own = self.where.split(list(self.sizes))
        where = torch.cat([own[r] for r in rows])
        indices, names = [self.indices[r] for r in rows], [self.names[r] for r in rows]
        return Gathered(indices, names, self.examples, where, [self.sizes[r] for r in rows])


@runtime_checkable
class Population(Protocol):
    """A lazy sequence of clients: `population[i]` gathers the examples of client i when asked.

    Optional: `gather(indices) -> Gathered`, several clients at once, and no copy of their examples.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Client: ...


@runtime_checkable
class Prior(Protocol):
    """p(phi_s | eta): five short methods, in this order, and the names of what travels.

    Optional methods, looked up by the functions of `algorithm.py` and described there:
    `bind(model, x)`, `sample(eta, rng)`, `cut(eta)`, `cuts(eta)`, `message(eta, q)`, `reference(eta, sent)`,
    `accept(eta, stats)`, `project(eta, before)`, `kept(q)`, `recall(kept)`, `predictive(eta, rng)`,
    `log_hyper(eta, before)`; and optional attributes, `exact`, `bounds`, `precise` and `precise_eta`.
    """

    @property
    def uplink(self) -> tuple[str, ...]:
        """Names of the statistics that m_step reads, hence of those that are sent."""
        ...

    def init(self, params: Params, /) -> Eta:
        """The first eta, from a model's initial parameters."""
        ...

    def stats(self, q: Any, /) -> Stats:
        """E_q[T(phi)] of one client (clients = 1)."""
        ...

    def log_prob(self, eta: Eta, stats: Stats, /) -> Tensor:
        """E_q[log p(phi | eta)] in nats, up to a constant: a scalar, linear in stats."""
        ...

    def m_step(self, eta: Eta, total: Stats, /) -> Eta:
        """argmax of log_prob(., total) + log_hyper; eta is kept where total says nothing."""
        ...

    def point(self, eta: Eta, /) -> Params:
        """The parameters to evaluate, export, and start the next E-step from."""
        ...


@runtime_checkable
class Inference(Protocol):
    """An E-step: maximises E_q[log p(D_s | phi)] + E_q[log p(phi | eta)] + H[q] over q.

    The log-likelihood is the SUM over the client's examples (see objective.py for the scale).
    An optional method, described in `algorithm.py`: `personal(objective, prior, eta, client, state, rng)`.
    """

    def start(self, prior: Prior, eta: Eta, /) -> Any:
        """The posterior before any data is seen: where the E-step begins."""
        ...

    def e_step(
        self,
        objective: Objective,
        prior: Prior,
        eta: Eta,
        client: Client,
        state: Params | None,
        rng: torch.Generator,
    ) -> tuple[Any, Params | None]:
        """The client's posterior and its next personal state; a state of None is a new client."""
        ...


@runtime_checkable
class ServerStep(Protocol):
    """How eta moves towards the exact M-step's answer: eta' = eta + step(target - eta)."""

    def init(self, eta: Params) -> Params:
        """The optimiser's state for a flat eta."""
        ...

    def step(self, eta: Params, target: Params, state: Params) -> tuple[Params, Params]:
        """The new flat eta and the new state; neither argument is changed."""
        ...


Schema = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""What both sides know before a message is sent: name -> (shape, dtype), in order."""


@runtime_checkable
class Codec(Protocol):
    """Bytes on the wire, and back."""

    def encode(self, message: Params, clients: float) -> bytes:
        """One framed payload; `clients` is the weight the message stands for (0 downwards)."""
        ...

    def decode(self, payload: bytes, schema: Schema) -> tuple[Params, float]:
        """The message and its weight; a PayloadError for anything but a valid finite payload."""
        ...


@runtime_checkable
class Work(Protocol):
    """One round's work, as run.py hands it to an engine."""

    @property
    def store(self) -> Any:
        """Personal states; a copy of the work in another process asks the run's own (store.py)."""
        ...

    def client(self, index: int, /) -> Any:
        """What client `index` uploads: its E-step's statistics, encoded."""
        ...

    def receive(self, upload: Any, /) -> Stats | None:
        """The server's side: the decoded statistics, or None for an upload that was refused."""
        ...

    def changes(self) -> Any:
        """What differs from round to round, as plain data."""
        ...

    def changed(self, changes: Any, /) -> Work:
        """An earlier round's work made into that of the round that `changes` come from."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Runs a round's clients. Engines differ in speed only. `close()`, if there is one, is called at a run's end."""

    def map_sum(self, work: Work, indices: Sequence[int], /) -> Stats | None:
        """The sum, in the order of `indices`, of receive(client(index)) without the Nones."""
        ...
