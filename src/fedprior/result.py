"""What a run gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fedprior import planning, wire
from fedprior.algorithm import Algorithm
from fedprior.core import Client, Eta, Examples, Params, Population
from fedprior.metrics import Row, before_and_after, evaluate_clients
from fedprior.objective import Objective
from fedprior.posteriors import Predictive
from fedprior.progress import left_whole
from fedprior.records import Round, warning
from fedprior.rng import generator
from fedprior.store import ClientStore, MemoryStore


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run.

    Attributes:
        algorithm: as it ran (bound to the model).
        objective: the model's architecture and its loss.
        eta: the prior's parameters after the last round.
        history: one record a round, with one record a client in each.
        inputs: up to 64 real ones, shape (n, ...): an export is tried on them.
        store: the clients' personal states.
        device: of eta and of the model.
    """

    algorithm: Algorithm
    objective: Objective
    eta: Eta
    history: list[Round]
    inputs: Tensor
    store: ClientStore = field(default_factory=MemoryStore)
    device: str = "cpu"

    @property
    def params(self) -> Params:
        """The full model's parameters, prior.point(eta); those of removed units are zero."""
        return self.algorithm.prior.point(self.eta)

    def model(self) -> nn.Module:
        """A copy of the model in evaluation mode; physically smaller if units were removed."""
        objective, params = self._deployed()
        return objective.module(params)

    @property
    def kept(self) -> Mapping[str, tuple[int, ...]]:
        """Group -> numbers of the units that are left of it in `model()`; empty if no unit was removed."""
        made_by = self._deployed()[0].made_by
        return made_by.kept if made_by else {}

    def _deployed(self) -> tuple[Objective, Params]:
        return self.algorithm.deploy(self.eta, self.objective)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the newest evaluated round; empty if there was no test set."""
        return next((r.metrics for r in reversed(self.history) if r.metrics), {})

    @property
    def accuracy(self) -> float:
        """Test accuracy in [0, 1]; nan if it was not measured."""
        return self.metrics.get("accuracy", float("nan"))

    @property
    def nats(self) -> float:
        """Test negative log-likelihood per example; nan if it was not measured."""
        return self.metrics.get("nats", float("nan"))

    @property
    def bytes_up(self) -> int:
        """Payload bytes from all clients, all rounds."""
        return sum(r.bytes_up for r in self.history)

    @property
    def bytes_down(self) -> int:
        """Payload bytes to all clients, all rounds."""
        return sum(r.bytes_down for r in self.history)

    @property
    def parameters(self) -> int:
        """Entries of the model's parameters; buffers do not count."""
        return self.objective.count(self.params)

    @property
    def parameters_left(self) -> int:
        """Those of `model()`."""
        objective, params = self._deployed()
        return objective.count(params)

    @property
    def seconds(self) -> float:
        """Wall time of all rounds and their evaluations, those before a resume included."""
        return sum(r.seconds + r.seconds_evaluate for r in self.history)

    def per_client(self, clients: Population, limit: int = 1000) -> list[dict[str, float | str]]:
        """The final model on each of the first `limit` clients: held-out examples, else training examples.

        A client that keeps parameters of its own is evaluated with them.
        """
        chosen = (clients[i] for i in range(min(limit, len(clients))))
        if not hasattr(self.algorithm.prior, "recall"):
            return evaluate_clients(*self._deployed(), chosen)
        return [row for client in chosen for row in evaluate_clients(*self._received(client), [client])]

    def personal(self, client: Client) -> Predictive:
        """What a client predicts with after it has adapted to its training examples, from its state if it has one."""
        on_device = replace(client, train=client.train.to(self.device))
        rng = generator(0, client.index, "personal")
        return self.algorithm.personal(self.objective, self.eta, on_device, *self._state(client), rng)

    def _state(self, client: Client) -> tuple[Params | None, Params | None]:
        state = self.store.load(client.index)
        return wire.part(state, "e_step", self.device), wire.part(state, "kept", self.device)

    def personalised(self, clients: Population, limit: int = 1000) -> list[Row]:
        """One row for each of the first `limit` clients: its held-out examples before and after it has adapted.

        `before_...` is the model as it arrives (with the client's own parameters, if it has any), `after_...` is
        `personal(client)`; `seen` is "yes" for a client whose statistics were in the sum of some round. Clients
        without held-out examples are evaluated on what they train on, and `on` says so. metrics.over_clients sums up,
        of seen and unseen clients apart with metrics.by_seen.
        """
        seen = {c.index for r in self.history for c in r.clients if c.status == "ok"}
        rows = []
        for client in (clients[i] for i in range(min(limit, len(clients)))):
            row = before_and_after(self.objective, self._received(client), self.personal(client), client)
            rows.append(row | {"seen": "yes" if client.index in seen else "no"})
        return rows

    def _received(self, client: Client) -> tuple[Objective, Params]:
        """The model as it arrives at a client, with the client's own parameters if it has any."""
        local = replace(self.algorithm, prior=self.algorithm.seen_by(self._state(client)[1]))
        return local.deploy(self.eta, self.objective)

    def row(self) -> dict[str, str | float | int]:
        """The numbers of a comparison: one line of results.json."""
        return {
            "algorithm": self.algorithm.name,
            **({"accuracy": self.accuracy} if "accuracy" in self.metrics else {}),
            "nats": self.nats,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "parameters": self.parameters,
            "parameters_left": self.parameters_left,
            "seconds": self.seconds,
            "rounds": len(self.history),
        }

    def __repr__(self) -> str:
        return f"Result({self.summary()})"

    def summary(self) -> str:
        """One line for people, and one each for a budget, a warning and layers that stay whole; MB are 10^6 bytes."""
        metrics = ", ".join(f"{k} {v:.4f}" if abs(v) < 1e4 else f"{k} {v:.1e}" for k, v in self.metrics.items())
        left = 100 * self.parameters_left / self.parameters
        line = (
            f"{self.algorithm.name}: {metrics or 'not evaluated'}; "
            f"{self.bytes_up / 1e6:.2f} MB up, {self.bytes_down / 1e6:.2f} MB down, "
            f"{self.parameters_left:,} of {self.parameters:,} parameters left ({left:.1f} %), "
            f"{len(self.history)} rounds in {self.seconds:.1f} s"
        )
        if self.algorithm.budget is not None:
            line += f"\n  {self._spent()}"
        troubles, whole = warning(self.history), left_whole(self.objective.model, self.algorithm.prior)
        line += f"\n  warning: {troubles}" if troubles else ""
        return f"{line}\n  {whole}" if ", " in whole else line  # one layer always does: that of the outputs

    def _spent(self) -> str:
        """What has been spent of a budget of bytes, and whether that is why there are no further rounds."""
        budget: Any = self.algorithm.budget
        text = f"{(self.bytes_up + self.bytes_down) / 1e6:.4g} of budget_mb={budget.mb:g} spent"
        cohort, known = len(self.history[-1].clients), planning.known(self.algorithm, self.eta)
        return text + ", and one more round might exceed it" * budget.spent(self.history, cohort, *known)


def some_inputs(clients: Population, test: Examples | None) -> Tensor:
    """Up to 64 inputs of the test set, else of the first client."""
    return (clients[0].train if test is None else test).x[:64].to("cpu", copy=True)
