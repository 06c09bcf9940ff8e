"""Worker processes, one thread each: the clients of a round side by side, and the sum of the sequential engine.

The processes are forks of the run when the first round begins: they have the population, the model and the algorithm
without a copy being sent. What a round changes (its number, the broadcast payload) and clients' personal states go to
them through pipes, and uploads come back through shared memory. A client is done by one worker from end to end, with
the generator of its own, so that the bits are those of `Sequential(threads=1)`.

A window of the cohort is handed out longest first, and received in the order of the cohort: what waits to be received
is at most a window, however large the cohort.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fedprior.core import Params, Stats, Work
from fedprior.engines.costs import Costs
from fedprior.engines.mailbox import Mailbox
from fedprior.engines.sequential import summed, torch_threads
from fedprior.layer import LAYERS

WINDOW = 16


class WorkerError(RuntimeError):
    """A worker process ended without an answer."""


class RemoteTraceback(Exception):
    """The traceback of an exception as its worker saw it: the `__cause__` of the exception that arrives."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class Workers:
    """Processes that live from the first round until `close`.

    Attributes:
        count: how many; None for one a core.
    """

    count: int | None = None
    costs: Costs = field(default_factory=Costs, repr=False)
    _pool: list[_Worker] = field(default_factory=list, repr=False)
    _store: Any = field(default=None, repr=False)  # whose run was forked: each has a store of its own
    layers = LAYERS

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")

    @staticmethod
    def usable(device: str = "cpu") -> bool:
        """Can this process be forked? Not on every system, not below a daemon, not where PyTorch sees a GPU.

        With a GPU in sight, autograd starts threads at the first backward pass, also on the CPU, and refuses to work in
        a fork from then on.
        """
        forks = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
        gpu = torch.device(device).type != "cpu" or torch.cuda.device_count() > 0
        return forks and not gpu and not multiprocessing.current_process().daemon

    def map_sum(self, work: Work, indices: Sequence[int]) -> Stats | None:
        """The sum of the clients' statistics in the order of `indices`."""
        with torch_threads(1):  # threads of the sum would take the cores that the workers have
            return summed(work, self.uploads(work, indices))

    def uploads(self, work: Work, indices: Sequence[int]) -> Iterator[Any]:
        """What the clients send, in the order of `indices`."""
        self._begin(work)
        done, pool = False, self._pool
        try:
            yield from self._uploads(work, indices)
            done = True
        finally:
            if not done and self._pool is pool:  # which may have ended long before this generator is cleared away
                self.close()  # answers that nobody waits for any more may be in the pipes

    def _begin(self, work: Work) -> None:
        """Fork in the first round of a run, tell what has changed in the later ones."""
        if self._pool and self._store is not work.store:
            self.close()
        if self._pool:
            changes = pickle.dumps(("round", work.changes()), protocol=5)
            for worker in self._pool:
                worker.tell(changes)
            return
        if not self.usable():
            raise RuntimeError("worker processes cannot be forked here: use fedprior.engines.Sequential()")
        self._store = work.store
        for _ in range(self.count or cores()):
            self._pool.append(_Worker.fork(work, [w.pipe for w in self._pool]))

    def _uploads(self, work: Work, indices: Sequence[int]) -> Iterator[Any]:
        """The uploads in the order of `indices`."""
        order, step = list(indices), WINDOW * len(self._pool)
        todo = [
            i for start in range(0, len(order), step) for i in self.costs.longest_first(order[start : start + step])
        ]
        todo.reverse()
        arrived: dict[int, Any] = {}
        idle, stored = list(self._pool), work.store.holds_any()
        for position, index in enumerate(order):
            while True:
                ahead = len(order) - len(todo) - position  # clients handed out and not yet received
                while idle and todo and ahead < 2 * step:
                    idle.pop().start(todo.pop(), stored)
                    ahead += 1
                if index in arrived:
                    break
                idle += self._collect(work, arrived)
            yield arrived.pop(index)

    def _collect(self, work: Work, arrived: dict[int, Any]) -> list[_Worker]:
        """Wait for messages; the workers that have finished their client."""
        free = []
        busy = {w.pipe: w for w in self._pool if w.index is not None}
        for pipe in wait(list(busy)):
            worker = busy[pipe]  # pyright: ignore[reportArgumentType]
            kind, value = worker.hear()
            if kind == "load":
                worker.tell(_answer("state", work.store.load, value))
            elif kind == "error":
                raise _unpickled(value)
            else:
                index = worker.finished()
                arrived[index] = value
                self.costs.saw(index, value.seconds)
                free.append(worker)
        return free

    def close(self) -> None:
        """End the processes; the next round would fork new ones."""
        for worker in self._pool:
            worker.end()
        self._pool, self._store = [], None


@dataclass
class _Worker:
    """The parent's view of one process; `index` is the client that it works on."""

    process: BaseProcess
    pipe: Connection
    box: Mailbox
    index: int | None = None

    @classmethod
    def fork(cls, work: Work, others: Sequence[Connection]) -> _Worker:
        """A copy of this process that knows `work`; `others` are ends of pipes that are not for it."""
        context = multiprocessing.get_context("fork")
        (here, there), box = context.Pipe(), Mailbox()
        process = context.Process(target=_serve, args=(work, there, box, [here, *others], os.getpid()), daemon=True)
        with warnings.catch_warnings():  # of a fork beside threads: those of the progress bar hold no lock of ours
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        there.close()
        return cls(process, here, box)

    def start(self, index: int, stored: bool) -> None:
        """Hand out one client; `stored`: are there personal states to ask for?"""
        self.index = index
        self.tell(pickle.dumps(("client", (index, stored))))

    def finished(self) -> int:
        """The client that it has worked on."""
        index, self.index = self.index, None
        assert index is not None
        return index

    def tell(self, message: bytes) -> None:
        """Send; the worker is waiting to read."""
        try:
            self.box.send(self.pipe, message)
        except OSError as error:
            raise self._died() from error

    def hear(self) -> tuple[str, Any]:
        """The next message."""
        try:
            return pickle.loads(self.box.receive(self.pipe))
        except (EOFError, OSError) as error:
            raise self._died() from error

    def _died(self) -> WorkerError:
        self.process.join(1)
        doing = "between two clients" if self.index is None else f"while it worked on client {self.index}"
        return WorkerError(
            f"a worker process died {doing} (exit code {self.process.exitcode}; -9 is often a lack of memory). "
            "Resume from the last checkpoint, with fewer workers if memory is short"
        )

    def end(self) -> None:
        """Close the pipe, and do not wait for a client's end."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Asking:
    """The store as a worker sees it: the states are with the parent."""

    pipe: Connection
    box: Mailbox
    stored: bool = True

    def load(self, index: int) -> Params | None:
        if not self.stored:
            return None
        self.pipe.send_bytes(pickle.dumps(("load", index)))
        kind, value = pickle.loads(self.box.receive(self.pipe))
        if kind == "error":
            raise _unpickled(value)
        return value


def _serve(work: Any, pipe: Connection, box: Mailbox, not_mine: Sequence[Connection], parent: int) -> None:
    """A worker's life: until the parent closes the pipe, or dies."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for other in not_mine:
        other.close()
    torch.set_num_threads(1)
    work.store = _Asking(pipe, box)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            order, what = pickle.loads(box.receive(pipe))
            if order == "round":
                work = work.changed(what)
            else:
                index, work.store.stored = what
                box.send(pipe, _answer("upload", work.client, index))


def _answer(kind: str, function: Callable[[int], Any], index: int) -> bytes:
    """What the function gives, or its exception, for the process at the other end."""
    try:
        return pickle.dumps((kind, function(index)), protocol=5)
    except Exception as error:
        return _pickled(error)


def _pickled(error: Exception) -> bytes:
    text = "".join(traceback.format_exception(error))
    notes = getattr(error, "__notes__", [])
    try:
        pickle.loads(whole := pickle.dumps(error))
    except Exception:  # some exceptions cannot be copied: any, as their authors wrote the copying
        whole = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return pickle.dumps(("error", (whole, notes, text)))


def _unpickled(value: tuple[bytes, list[str], str]) -> Exception:
    whole, notes, text = value
    error: Exception = pickle.loads(whole)
    error.__notes__ = []
    for note in notes:
        error.add_note(note)
    error.__cause__ = RemoteTraceback(text)
    return error


def _die_with(parent: int) -> None:
    """On Linux the kernel kills this process when its parent dies, however it dies; elsewhere the pipe's end does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
