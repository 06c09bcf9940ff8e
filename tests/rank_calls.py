"""Calls below torchrun: a function in forked processes with a rank's environment, over gloo; and torchrun itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _one(rank: int, count: int, port: int, folder: Path, function: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        told = {"value": function(rank)}
    except Exception as error:
        told = {"error": type(error).__name__, "text": str(error), "notes": getattr(error, "__notes__", [])}
        told["cause"] = str(error.__cause__)
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


def start(count: int, folder: Path, function: Callable[[int], Any]) -> list[BaseProcess]:
    """The processes; `answers` waits for them."""
    folder.mkdir(parents=True, exist_ok=True)
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks = [context.Process(target=_one, args=(r, count, port, folder, function), daemon=True) for r in range(count)]
    for rank in ranks:
        rank.start()
    return ranks


def answers(ranks: list[BaseProcess], folder: Path, seconds: float = 60) -> list[dict[str, Any] | None]:
    """What each rank came to; None of one that was killed. Processes that hang are killed, and the test fails."""
    try:
        for rank in ranks:
            rank.join(seconds)
            assert rank.exitcode is not None, "a rank hangs"
    finally:
        for rank in ranks:
            rank.kill()
    files = [folder / f"rank-{number}.json" for number in range(len(ranks))]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def call(count: int, folder: Path, function: Callable[[int], Any]) -> list[dict[str, Any] | None]:
    return answers(start(count, folder, function), folder)


def torchrun(count: int, *arguments: object) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node=count -m fedprior run ...`, in a session of its own."""
    where = ["--master-addr=127.0.0.1", f"--master-port={free_port()}", f"--nproc-per-node={count}"]
    command = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "fedprior", "run", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(ranks: subprocess.Popen[str], seconds: float = 120) -> tuple[str, str]:
    """What torchrun and its ranks printed, once all have ended: stdout and stderr."""
    try:
        return ranks.communicate(timeout=seconds)
    finally:
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
