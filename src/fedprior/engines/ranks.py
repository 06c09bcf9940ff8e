"""Ranks: the processes that torchrun has started, and messages between them.

Messages are bytes and go by way of rank 0, which hears from each rank in turn: so a rank that has died has a number,
and rank 0 can tell it to the rest. Sums alone go from all to all.

Whatever goes wrong on one rank ends all of them: an exception is sent in the place of the message that it prevented,
and the end of a process closes its connections. A rank that neither answers nor dies is given up after the timeout.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fedprior.engines.workers import RemoteTraceback


class RankError(RuntimeError):
    """Another rank died, or its work failed."""


def launched() -> bool:
    """Did torchrun start this process, beside others?"""
    return {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Is this the process that prints and writes? A process of its own is; of ranks, rank 0."""
    return not launched() or int(os.environ["RANK"]) == 0


@dataclass
class Ranks:
    """This process among `count`, of which it is number `number`.

    Attributes:
        timeout_seconds: how long one waits for another.
    """

    number: int
    count: int
    timeout_seconds: float

    @classmethod
    def join(cls, timeout_seconds: float) -> Ranks:
        """Meet the others; gloo for what is on the CPU, nccl for what is on GPUs."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        return cls(dist.get_rank(), dist.get_world_size(), timeout_seconds)

    def leave(self) -> None:
        """Close the connections."""
        dist.destroy_process_group()

    def add(self, values: Tensor) -> None:
        """Put the sum over ranks into `values`, the same bits on all of them."""
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            raise RankError(f"a rank died while the statistics were added: {error}") from error

    def hand_out(self, message: Callable[[int], bytes]) -> bytes:
        """What rank 0 has for each of the others; nothing for itself."""
        if self.number:
            return self._hear(0)
        for rank in range(1, self.count):
            self._tell(rank, message(rank))
        return b""

    def together(self, part: Callable[[], bytes], merge: Callable[[Sequence[bytes]], bytes]) -> bytes:
        """merge(the parts of ranks 0, 1, ...), made on rank 0, on all ranks.

        Raises:
            RankError: on the other ranks, if one of them died or raised an exception, which that rank raises itself.
        """
        mine, failed = _tried(self.number, part)
        if self.number:
            self._tell(0, mine)
            answer = self._heard(0)
        else:
            parts = [mine, *(self._heard(rank) for rank in range(1, self.count))]
            answer = next((p for p in parts if _is_failure(p)), b"")
            if not answer:
                answer, failed = _tried(0, lambda: merge([p[1:] for p in parts]))
            self._answer(answer, [rank for rank, p in enumerate(parts) if rank and not _died(p)])
        if failed is not None:  # which tells more than an answer
            raise failed
        if _is_failure(answer):
            told = json.loads(answer[1:])
            raise RankError(told["what"]) from RemoteTraceback(told["traceback"] or told["what"])
        return answer[1:]

    def _answer(self, answer: bytes, alive: Sequence[int]) -> None:
        """To those who are alive; of a failure, to whoever still listens."""
        for rank in alive:
            try:
                self._tell(rank, answer)
            except RankError:
                if not _is_failure(answer):
                    raise

    def _heard(self, rank: int) -> bytes:
        """The message of a rank, or that there will be none."""
        try:
            return self._hear(rank)
        except RankError as error:
            return _failure(str(error), "")

    def _tell(self, rank: int, message: bytes) -> None:
        try:
            dist.send(torch.tensor([len(message)]), rank)
            if message:
                dist.send(torch.frombuffer(bytearray(message), dtype=torch.uint8), rank)
        except RuntimeError as error:
            raise self._lost(rank, error) from error

    def _hear(self, rank: int) -> bytes:
        try:
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, rank)
            message = torch.empty(int(length), dtype=torch.uint8)
            if len(message):
                dist.recv(message, rank)
        except RuntimeError as error:
            raise self._lost(rank, error) from error
        return message.numpy().tobytes()

    def _lost(self, rank: int, error: RuntimeError) -> RankError:
        return RankError(
            f"rank {rank} of {self.count} died, or did not answer within {self.timeout_seconds:g} seconds; go on from "
            f"the last checkpoint, with any number of ranks ({str(error).splitlines()[0]})"
        )


def _tried(rank: int, make: Callable[[], bytes]) -> tuple[bytes, Exception | None]:
    """A message: what was made, or the exception that prevented it."""
    try:
        return b"+" + make(), None
    except Exception as error:
        what = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        return _failure(f"rank {rank} failed: {what}", "".join(traceback.format_exception(error))), error


def _failure(what: str, trace: str) -> bytes:
    return b"-" + json.dumps({"what": what, "traceback": trace}).encode()


def _is_failure(message: bytes) -> bool:
    return message.startswith(b"-")


def _died(message: bytes) -> bool:
    return _is_failure(message) and not json.loads(message[1:])["traceback"]
