"""A federation of real processes on this machine, stopped by their process groups."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from importlib import util
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import fedprior as fp
from cases import Lost
from fedprior.cli import app

FEDPRIOR = [sys.executable, "-m", "fedprior"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Deployment:
    """Programs in process groups of their own, each with a log in `folder`."""

    def __init__(self, folder: Path, *security: str) -> None:
        self.folder, self.security = folder, security or ("--insecure",)
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.sockets = tempfile.TemporaryDirectory(prefix="fp-")  # a short path: sockets allow no more
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.env |= {"HOME": str(folder), "TMPDIR": self.sockets.name}
        self.env |= {"FLWR_HOME": str(folder / "flwr"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def __enter__(self) -> Deployment:
        port = self.address.split(":")[1]
        self.start("superlink", "superlink", "--port", port)
        for _ in range(300):
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 1):
                return self
            time.sleep(0.1)
        raise TimeoutError(self.log("superlink"))

    def __exit__(self, *_: object) -> None:
        self.stop(*self.processes)
        for pid in programs(self, ""):  # a SuperLink starts its ServerApps in a session of their own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.sockets.cleanup()

    def stop(self, *names: str) -> None:
        """End process groups, with all that they have started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for name in names:
                with suppress(ProcessLookupError):
                    os.killpg(self.processes[name].pid, number)
            time.sleep(0.5)
        for name in names:
            self.processes.pop(name).wait()

    def start(self, name: str, *arguments: str, security: tuple[str, ...] | None = None) -> None:
        """One of our commands."""
        self.program(name, *FEDPRIOR, "federate", *arguments, *(self.security if security is None else security))

    def program(self, name: str, *command: str) -> None:
        """Any program."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env=self.env
            )

    def node(self, partition: int, of: int, security: tuple[str, ...] | None = None, name: str = "") -> None:
        place = ["--partition", str(partition), "--partitions", str(of), "--port", str(free_port())]
        self.start(name or f"node-{partition}", "supernode", self.address, *place, security=security)

    def call(self, *arguments: str, code: int | None = 0, security: tuple[str, ...] | None = None) -> str:
        """A command that ends by itself; what it prints."""
        command = [*FEDPRIOR, "federate", *arguments, *(self.security if security is None else security)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=240)
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")


def programs(d: Deployment, word: str) -> list[int]:
    """Processes of this federation with a word in their command line, but no zombies."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            home = (folder / "environ").read_bytes() if folder.name.isdigit() else b""
        except OSError:
            continue
        if f"HOME={d.folder}".encode() in home.split(b"\0") and any(word.encode() in w for w in words):
            found.append(int(folder.name))
    return found


NODES, ROUNDS, COHORT, CLIENTS = 3, 3, 8, 20
IMPORTS = """from dataclasses import replace

from fedprior.privacy import Privacy, SecureSum
from fedprior.robust import CentredClip

"""


def project(folder: Path, algorithm: str) -> Any:
    """The project as `init` writes it, with another algorithm and states in `folder`; its task module."""
    CliRunner().invoke(app, ["federate", "init", str(folder)], catch_exceptions=False)
    path = folder / "job" / "task.py"
    text = path.read_text()
    for old, new in {
        "fp.fedavg(lr=0.1, epochs=3)": algorithm,
        "MODEL)": f"MODEL, state={str(folder)!r})",
        "import fedprior as fp\n": f"{IMPORTS}import fedprior as fp\n",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)
    spec = util.spec_from_file_location("task", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def running(d: Deployment, folder: Path, **config: Any) -> list[str]:
    """The command of a run."""
    config = {"rounds": ROUNDS, "cohort": COHORT, "out": str(folder / "out"), "seconds": 120} | config
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    return ["run", str(folder / "job"), d.address, "--stream", "--run-config", text]


def start_run(d: Deployment, folder: Path, **config: Any) -> str:
    """A whole run; what it prints."""
    return d.call(*running(d, folder, **config), code=None)


def begin_run(d: Deployment, folder: Path, name: str = "run", **config: Any) -> None:
    """Without waiting for its end."""
    d.start(name, *running(d, folder, **config))


def after_round(d: Deployment, folder: Path, number: int) -> None:
    """Wait until a round has its record."""
    path = folder / "out" / "records.jsonl"
    for _ in range(1200):
        if path.exists() and len(path.read_bytes().splitlines()) >= number:
            return
        time.sleep(0.1)
    raise TimeoutError(d.log("run"))


def simulated(task: Any, lost: Collection[tuple[int, int]] = (), **fields: Any) -> fp.Result:
    """The same run in this process."""
    fields = {"rounds": ROUNDS, "cohort": COHORT, "test": task.held_out(), "engine": "sequential"} | fields
    return fp.run(task.ALGORITHM, task.MODEL, task.clients(0, 1), availability=Lost(lost), **fields)
