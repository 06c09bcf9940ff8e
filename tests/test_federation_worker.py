"""The process that stays on a node: the same bits, one process for many messages, gone with its SuperNode."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import fedprior as fp
from cases import equal
from fedprior import tree

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from fedprior.federation import GridEngine, Roster, worker
from fedprior_node import resident, resident_app
from grid import CLIENTS, MODEL, LocalGrid, own

FEDAVG = fp.fedavg(0.1)
TASK = """
import os, sys
sys.path.insert(0, {tests!r})
from fedprior.federation import Node
from grid import MODEL, own
import fedprior as fp

def clients(partition, partitions):
    with open({log!r}, "a") as log:
        print(os.getpid(), file=log)
    return own(partition, partitions)

def node():
    return Node(fp.fedavg(0.1), clients, MODEL)

def nothing():
    return None
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A job's module, and a short folder for sockets."""
    (tmp_path / "a_task.py").write_text(TASK.format(tests=str(Path(__file__).parent), log=str(tmp_path / "pids")))
    monkeypatch.syspath_prepend(str(tmp_path))
    with tempfile.TemporaryDirectory(prefix="fp-") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield tmp_path


def ended(pid: int, seconds: float = 10) -> bool:
    """Has a process gone? A child of ours is waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return True
        except ChildProcessError:
            if not worker.alive(pid):
                return True
        time.sleep(0.05)
    return False


def test_one_process_answers_all_messages_and_ends_with_its_supernode(task: Path, monkeypatch) -> None:
    supernode = subprocess.Popen(["sleep", "1000"])
    monkeypatch.setattr(os, "getppid", lambda: supernode.pid)
    try:
        grid = LocalGrid(resident_app("a_task:node"), 1)
        engine = GridEngine(grid, 1, seconds=60)
        got = fp.run(FEDAVG, MODEL, Roster(len(CLIENTS), CLIENTS[0].train), rounds=4, engine=engine)
    finally:
        supernode.kill()
        supernode.wait()
    want = fp.run(FEDAVG, MODEL, own(0, 1), rounds=4, engine=fp.engines.Sequential(1))
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    (pid,) = (task / "pids").read_text().split()
    assert int(pid) != os.getpid() and ended(int(pid))
    assert not list(Path(tempfile.gettempdir()).glob("*/*.sock"))


def test_a_worker_that_is_killed_changes_no_bit(task: Path, monkeypatch) -> None:
    """While it answers: the message is asked again of a new one, from the same states."""
    monkeypatch.setattr(os, "getppid", os.getpid)
    sent = resident.send
    asked = 0

    def killing(connection: socket.socket, head: dict, blob: bytes) -> None:
        nonlocal asked
        asked += 1
        sent(connection, head, blob)
        if asked in (2, 4):
            os.kill(int((task / "pids").read_text().split()[-1]), signal.SIGKILL)

    monkeypatch.setattr(resident, "send", killing)
    engine = GridEngine(LocalGrid(resident_app("a_task:node"), 1), 1, seconds=60)
    roster = Roster(len(CLIENTS), CLIENTS[0].train)
    got = fp.run(FEDAVG, MODEL, roster, rounds=3, engine=engine)
    os.kill(int((task / "pids").read_text().split()[-1]), signal.SIGKILL)
    want = fp.run(FEDAVG, MODEL, own(0, 1), rounds=3, engine=fp.engines.Sequential(1))
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta)) and not any(r.lost() for r in got.history)
    assert asked == 6 and len((task / "pids").read_text().split()) == 3


DYING = """
import os, signal
if os.path.getsize({deaths!r}) < {times}:
    with open({deaths!r}, "a") as deaths:
        print(end="x", file=deaths)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_is_killed_while_it_starts_is_started_once_more(times: int, task: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "getppid", os.getpid)
    (task / "deaths").touch()
    text = DYING.format(deaths=str(task / "deaths"), times=times) + (task / "a_task.py").read_text()
    (task / "a_task.py").write_text(text)
    grid = LocalGrid(resident_app("a_task:node"), 1)
    engine, roster = GridEngine(grid, 1, seconds=60), Roster(len(CLIENTS), CLIENTS[0].train)
    if times == 2:
        with pytest.raises(EOFError, match="killed by signal 9 while it started"):
            fp.run(FEDAVG, MODEL, roster, rounds=1, engine=engine)
        return
    got = fp.run(FEDAVG, MODEL, roster, rounds=1, engine=engine)
    os.kill(int((task / "pids").read_text().split()[-1]), signal.SIGKILL)
    assert not got.history[0].lost()


def test_a_worker_that_cannot_start_says_why(task: Path) -> None:
    for name, reason in (("a_task:nothing", "must return a fedprior.federation.Node"), ("no_task:node", "no_task")):
        with pytest.raises(RuntimeError, match=rf"(?s)ended with code 1.*{reason}"):
            resident.connected(name, 1)


def test_a_worker_ends_when_nothing_is_asked_of_it(tmp_path: Path, task: Path) -> None:
    path = Path(tempfile.gettempdir()) / "w.sock"
    began = time.monotonic()
    worker.serve(fp_node(), path, os.getpid(), 0.0)
    assert time.monotonic() - began < 30 and not path.exists()


def fp_node():
    from fedprior.federation import Node

    return Node(FEDAVG, own, MODEL)


def test_others_may_not_look_into_the_folder_of_sockets(task: Path) -> None:
    folder = resident._folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="alone"):
        resident._folder()


def test_what_goes_over_the_socket_arrives_and_is_no_pickle() -> None:
    here, there = socket.socketpair()
    with here, there:
        resident.send(here, {"place": [1, 3]}, b"blob")
        assert resident.receive(there) == ({"place": [1, 3]}, b"blob")
        resident.send(here, {}, b"")
        assert resident.receive(there) == ({}, b"")
        here.sendall(b"\x05\0\0\0" + bytes(8) + b"\x80\x05K\x01.")
        with pytest.raises((json.JSONDecodeError, UnicodeDecodeError)):
            resident.receive(there)
        here.sendall(b"\1")
        here.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            resident.receive(there)


def test_the_nodes_side_does_not_import_torch() -> None:
    code = "import fedprior_node, sys; fedprior_node.resident_app('a:b'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
