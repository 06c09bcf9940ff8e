"""The loop over rounds: run(algorithm, model, clients, rounds=..., cohort=...) -> Result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fedprior import checkpoint, checks, layer, planning, tree, wire
from fedprior.algorithm import Algorithm
from fedprior.cohort import Availability, sample
from fedprior.core import Client, Engine, Eta, Examples, Params, Population, Schema
from fedprior.engines import TorchRun, named, usual
from fedprior.layer import Finished, Setting
from fedprior.losses import Loss, PerExample
from fedprior.metrics import evaluate
from fedprior.objective import Objective
from fedprior.progress import Progress, doing, left_whole
from fedprior.records import RecordFile, Round
from fedprior.result import Result, some_inputs
from fedprior.rng import generator
from fedprior.round import RoundWork
from fedprior.store import ClientStore, DiskStore, MemoryStore


def run(
    algorithm: Algorithm,
    model: nn.Module,
    clients: Population | Sequence[Client],
    *,
    rounds: int,
    cohort: int | None = None,
    test: Examples | None = None,
    seed: int = 0,
    loss: str | Loss | PerExample = "classification",
    engine: Engine | str | None = None,
    availability: Availability | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 1,
    evaluate_every: int = 1,
    progress: bool | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> Result:
    """Train `model` over `clients` with `algorithm`, simulated in this process.

    Args:
        algorithm: what to run, e.g. fedprior.fedavg(lr=0.05).
        model: the architecture and its initial parameters; it is copied.
        clients: a lazy population, or a list of Client.
        rounds: total number of rounds, those before a resume included; fewer are run if a budget is spent before.
        cohort: clients sampled a round without replacement; None for all.
        test: examples for the central evaluation.
        seed: all randomness of the run derives from it.
        loss: a name of losses.LOSSES, a Loss, or (outputs, targets) -> log-likelihood of each example.
        engine: how clients are run, or its name in engines.ENGINES; if None, Auto() chooses, and below torchrun
            TorchRun() does this process's share: every rank returns the result, and rank 0 writes, shows the progress
            and calls on_round.
        availability: simulated drop-outs and deadline; everybody answers if None.
        device: of parameters and training, e.g. "cuda".
        out: folder for records.jsonl, checkpoints and personal states; nothing is written if None.
        resume: go on from `out`'s checkpoint; the result has the bits of a run that was never stopped. A density has
            a schedule for `rounds`: with more rounds than before, the rest of the run follows the new one.
        checkpoint_every: rounds between checkpoints (the last round always has one).
        evaluate_every: rounds between evaluations (the last round always has one).
        progress: show a progress bar; None shows it on a terminal.
        on_round: called with each round's record, after it was written.

    Raises:
        ValueError: before round one, for sizes or parts that do not fit together.
        FileExistsError: if `out` holds a run already and `resume` is False.
    """
    availability = availability or Availability()
    checks.check_types(algorithm, model, clients, availability, test)
    cohort = len(clients) if cohort is None else cohort
    counts = {"rounds": rounds, "checkpoint_every": checkpoint_every, "evaluate_every": evaluate_every}
    checks.check_sizes(clients, seed, cohort, counts)
    checks.check_clients(clients)
    engine = named(engine) if isinstance(engine, str) else engine or usual()
    device = engine.place(device) if isinstance(engine, TorchRun) else device
    checks.check_device(device)
    objective = Objective(model, loss, device)
    checks.check_fit(objective, clients, test, device)
    leads = not isinstance(engine, TorchRun) or engine.leads
    with doing(f"{algorithm.name}: looking at the model", progress if leads else False):
        loop = _Loop.build(algorithm, objective, clients, engine, availability, seed, rounds, cohort, device)
    folder = None if out is None or not leads else Path(out)
    progress, on_round = (progress, on_round) if leads else (False, None)
    with ExitStack() as stack:
        stack.callback(getattr(engine, "close", lambda: None))
        state, file, history = loop.begin(out, resume, counts, test)
        stack.callback(getattr(file, "close", lambda: None))
        whole = left_whole(objective.model, loop.algorithm.prior)
        bar = stack.enter_context(Progress(algorithm.name, rounds, progress, history, whole))
        last = state.number == rounds or loop.spent(history, state)
        while not last:
            state, record = loop.round(state)
            last = state.number == rounds or loop.spent([*history, record], state)
            if test is not None and (last or state.number % evaluate_every == 0):
                record = loop.evaluated(record, state, test)
            history.append(record)
            if folder is not None and file is not None:
                file.append(record)
                if last or state.number % checkpoint_every == 0:
                    file.sync()
                    _checkpoint(folder, loop, state)
            else:
                state.store.commit(state.number)
            bar.update(record, getattr(engine, "choice", ""))
            if on_round is not None:
                on_round(record)
    return Result(loop.algorithm, loop.objective, state.eta, history, some_inputs(clients, test), state.store, device)


RECORDS, STATES = "records.jsonl", "clients"


def _begin(out: str | Path | None, loop: _Loop, resume: bool, rounds: int) -> _Begun:
    """The first state, or the one that a folder's run has come to, with its records."""
    if out is None:
        if resume:
            raise ValueError("resume=True needs out=, the folder of the run to go on with")
        return loop.first(), None, []
    state = _open(Path(out), loop, resume)
    if state.number > rounds:
        raise ValueError(f"{out} has run {state.number} rounds already, and rounds={rounds} asks for fewer")
    file = RecordFile(Path(out) / RECORDS, state.number)
    return state, file, list(file.rounds)


@dataclass(frozen=True)
class _State:
    number: int
    eta: Eta
    server: Params
    store: ClientStore


_Begun = tuple[_State, RecordFile | None, list[Round]]


@dataclass(frozen=True)
class _Loop:
    """Everything that stays the same from round to round."""

    algorithm: Algorithm
    objective: Objective
    clients: Population
    engine: Engine
    availability: Availability
    seed: int
    rounds: int
    cohort: int
    device: str
    up_schema: Schema
    setting: dict[str, Any]

    @classmethod
    def build(
        cls,
        algorithm: Algorithm,
        objective: Objective,
        clients: Population,
        engine: Engine,
        availability: Availability,
        seed: int,
        rounds: int,
        cohort: int,
        device: str,
    ) -> _Loop:
        """Where the parts meet: a prior and an inference that do not fit are refused here."""
        setting = {"algorithm": str(algorithm), "seed": seed, "cohort": cohort, "population": len(clients)}
        setting |= {"availability": asdict(availability), "parameters": _shapes(objective.params())}
        setting |= {"data": checks.identity(clients), "loss": str(objective.loss)}
        x = clients[0].train.x[:1].to(device)
        algorithm, eta, up_schema = planning.prepare(algorithm, objective, x, rounds, cohort)
        algorithm = layer.plan(
            Setting(algorithm, up_schema, cohort, seed), eta, objective, engine, rounds, len(clients)
        )
        setting |= {"privacy": str(algorithm.privacy)} if algorithm.privacy else {}
        return cls(
            algorithm, objective, clients, engine, availability, seed, rounds, cohort, device, up_schema, setting
        )

    def spent(self, history: Sequence[Round], state: _State) -> bool:
        """Might one more round exceed the budget of bytes, or that of privacy?"""
        if self.algorithm.privacy is not None and self.algorithm.privacy.spent(state.number):
            return True
        budget = self.algorithm.budget
        return budget is not None and budget.spent(history, self.cohort, *planning.known(self.algorithm, state.eta))

    def begin(self, out: str | Path | None, resume: bool, counts: dict[str, int], test: Examples | None) -> _Begun:
        """`_begin`; below torchrun on rank 0, and the others are told what it came to, and have no file."""
        if not isinstance(self.engine, TorchRun):
            return _begin(out, self, resume, counts["rounds"])
        begun: list[_Begun] = []

        def start() -> tuple[checkpoint.Checkpoint, list[Round]]:
            begun.append(_begin(out, self, resume, counts["rounds"]))
            state, _, history = begun[0]
            return checkpoint.Checkpoint(state.number, tree.flatten(state.eta), state.server, {}), history

        more = {"initial model": tree.digest(self.objective.model.state_dict()), "test": checks.test_identity(test)}
        saved, history = self.engine.begin({**self.setting, **counts, **more}, start)
        return begun[0] if begun else (self.at(saved, MemoryStore()), None, history)

    def at(self, saved: checkpoint.Checkpoint, store: ClientStore) -> _State:
        """The state that was saved."""
        like, _ = self.algorithm.start(self.objective.params())
        eta, server = ({k: v.to(self.device) for k, v in part.items()} for part in (saved.eta, saved.server))
        return _State(saved.number, tree.unflatten(like, eta), server, store)

    def first(self, store: ClientStore | None = None) -> _State:
        """The state before round one."""
        eta, server = self.algorithm.start(self.objective.params())
        return _State(0, eta, server, store or MemoryStore())

    def round(self, state: _State) -> tuple[_State, Round]:
        """One round: send eta, run the E-steps, sum, M-step."""
        number, started = state.number + 1, time.perf_counter()
        down = b"" if self.algorithm.samples else wire.encode_eta(self.algorithm, state.eta)
        broadcast = time.perf_counter() - started
        work = RoundWork(
            algorithm=self.algorithm,
            objective=self.objective,
            population=self.clients,
            store=state.store,
            availability=self.availability,
            seed=self.seed,
            number=number,
            like=state.eta,
            down=down,
            up_schema=self.up_schema,
            device=self.device,
            rounds=self.rounds,
            cohort=self.cohort,
        )
        indices = sample(self.seed, number, len(self.clients), self.cohort, self.algorithm.poisson)
        work = work.begin(state.server, indices)
        done = work.finish(self.engine.map_sum(work, indices))
        eta, server, kept = self._m_step(state, done)
        seconds = time.perf_counter() - started
        deployed, params = self.algorithm.deploy(eta, self.objective)
        record = done.round(number, deployed.count(params), seconds, broadcast, kept)
        return _State(number, eta, server, state.store), record

    def evaluated(self, record: Round, state: _State, test: Examples) -> Round:
        """The record with metrics of the model after the round."""
        started = time.perf_counter()
        apart = self.engine.evaluate if isinstance(self.engine, TorchRun) else evaluate
        rng = generator(self.seed, state.number, "predictive")
        metrics = apart(*self.algorithm.predictive(state.eta, self.objective, rng), test).means()
        return replace(record, metrics=metrics, seconds_evaluate=time.perf_counter() - started)

    def _m_step(self, state: _State, done: Finished) -> tuple[Eta, Params, str]:
        """The new eta and server state; the old weights and state, and why, if there is nothing to go by."""
        if done.total is None:
            return *self.algorithm.idle(state.eta, state.server), done.why
        eta, server = self.algorithm.m_step(state.eta, done.total, state.server, self.objective.buffers)
        if not tree.finite([*tree.flatten(eta).values(), *server.values()]):
            return *self.algorithm.idle(state.eta, state.server), "the M-step of the summed statistics is not finite"
        return eta, server, ""


def _shapes(params: Params) -> dict[str, str]:
    return {k: f"{tuple(v.shape)} {v.dtype}" for k, v in params.items()}


def _open(folder: Path, loop: _Loop, resume: bool) -> _State:
    """A new run's folder, or the state of the run in it."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = checkpoint.read(folder)
    if not resume:
        if saved is not None or (folder / RECORDS).exists():
            raise FileExistsError(f"{folder} holds a run already: pass resume=True to go on, or another folder")
        return loop.first(DiskStore(folder / STATES))
    for left_by_a_crash in (*folder.glob(".*.tmp"), *folder.glob(f"{STATES}/.*.tmp")):
        left_by_a_crash.unlink()
    store = DiskStore(folder / STATES)
    store.rollback(0 if saved is None else saved.number)
    if saved is None:
        return loop.first(store)
    for key, value in loop.setting.items():
        if saved.setting.get(key) != value:
            raise ValueError(f"cannot resume {folder}: its {key} was {saved.setting.get(key)!r} and is now {value!r}")
    return loop.at(saved, store)


def _checkpoint(folder: Path, loop: _Loop, state: _State) -> None:
    checkpoint.Checkpoint(state.number, tree.flatten(state.eta), state.server, loop.setting).write(folder)
    state.store.commit(state.number)
