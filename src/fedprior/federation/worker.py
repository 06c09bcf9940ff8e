"""The process that stays on a node: it holds the data and PyTorch, and answers at a Unix socket (fedprior_node).

python -m fedprior.federation.worker MODULE:FUNCTION SOCKET SUPERNODE-PID IDLE-SECONDS
"""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path

from fedprior.federation.node import Node
from fedprior_node.resident import receive, send


def made(task: str) -> Node:
    """The Node that "module:function" returns."""
    module, _, function = task.partition(":")
    node = getattr(import_module(module), function)()
    if not isinstance(node, Node):
        raise TypeError(f"{task} must return a fedprior.federation.Node, got {type(node).__name__}")
    return node


def serve(node: Node, path: Path, supernode: int, idle_seconds: float) -> None:
    """Answer until the SuperNode has gone, or nothing was asked for `idle_seconds`; one request at a time."""
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(1)
        last = time.monotonic()
        while alive(supernode) and time.monotonic() - last < idle_seconds:
            with suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection, suppress(EOFError, BrokenPipeError, ConnectionResetError):  # of a run that was stopped
                    connection.settimeout(None)
                    head, blob = receive(connection)
                    send(connection, {}, node.answer(blob, *head["place"]))
                last = time.monotonic()
        path.unlink(missing_ok=True)


def alive(process: int) -> bool:
    """Is there a process of this number?"""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    serve(made(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
