"""A ClientApp that hands each message to a process that stays, and does not import PyTorch itself.

Flower starts a Python process for each message. Importing PyTorch and loading the data would take most of a short
round; here the first message starts a worker (fedprior/federation/worker.py), which later messages find at a Unix
socket in a folder of this user's alone. There is one worker for each SuperNode and version of the job. It belongs to
the SuperNode's process group, and ends when the SuperNode does or when nothing was asked of it for a while.

On the socket, both ways, little-endian:   length of the head (uint32), length of the blob (uint64), head, blob
The head is JSON: what this process knows and the worker does not. The blob is a bundle: errors are in there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedprior_node import flower

_LENGTHS = struct.Struct("<IQ")
_IDLE_SECONDS = 3600
_started: list[subprocess.Popen[bytes]] = []  # they stay when this process ends: nobody waits for them


def resident_app(task: str) -> flower.ClientApp:
    """A Flower ClientApp whose work is done by a process that stays on the node.

    Args:
        task: "module:function"; called in the worker without arguments, the function returns a fedprior Node.
    """

    def answer(blob: bytes, place: flower.Place, node: int) -> bytes:
        try:
            return _asked(task, node, place, blob)
        except (EOFError, BrokenPipeError, ConnectionResetError):  # the worker was killed; answers are repeatable
            return _asked(task, node, place, blob, anew=True)

    return flower.app(answer)


def _asked(task: str, node: int, place: flower.Place, blob: bytes, anew: bool = False) -> bytes:
    with connected(task, node, anew) as connection:
        send(connection, {"place": place}, blob)
        return receive(connection)[1]


def send(connection: socket.socket, head: dict[str, Any], blob: bytes) -> None:
    """One message."""
    text = json.dumps(head).encode()
    connection.sendall(_LENGTHS.pack(len(text), len(blob)) + text)
    connection.sendall(blob)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """One message; an EOFError if the other side has gone."""
    text, blob = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size))
    return json.loads(_exactly(connection, text)), _exactly(connection, blob)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data, at = bytearray(size), 0
    while at < size:
        got = connection.recv_into(memoryview(data)[at:])
        if not got:
            raise EOFError("the other side of the socket has gone")
        at += got
    return bytes(data)


def connected(task: str, node: int, anew: bool = False) -> socket.socket:
    """A connection to this node's worker, which is started if there is none, or the one there was has died (`anew`)."""
    supernode = os.getppid()
    name = hashlib.sha256(repr((task, node, supernode, sys.path, sys.executable)).encode()).hexdigest()[:16]
    path = _folder() / f"{name}.sock"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if anew:  # a dying process closes its connections before the socket at which it listens
            path.unlink(missing_ok=True)
        if (connection := _connect(path)) is None:
            connection = _start(task, path, supernode)
    return connection


def _folder() -> Path:
    """Where sockets are: nobody else may look into it."""
    folder = Path(tempfile.gettempdir()) / f"fedprior-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder of this user's alone (mode 700): remove it")
    return folder


def _connect(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


def _start(task: str, path: Path, supernode: int) -> socket.socket:
    """A new worker, once it listens."""
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "fedprior.federation.worker", task, str(path), str(supernode), str(_IDLE_SECONDS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    log = path.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    while (connection := _connect(path)) is None:
        if (code := process.poll()) is not None:
            if code < 0:
                raise EOFError(f"the worker was killed by signal {-code} while it started")
            raise RuntimeError(f"the worker ended with code {code}: {log.read_text()[-3000:]}")
        time.sleep(0.02)
    _started.append(process)
    return connection
