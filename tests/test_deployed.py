"""Federations of real processes on this machine: the same bits as simulated, and nobody joins without a key."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

import fedprior as fp
from cases import equal, without_seconds
from fedprior import checkpoint, records, tree

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from cryptography import x509  # pyright: ignore[reportMissingImports]
from cryptography.hazmat.primitives import serialization  # pyright: ignore[reportMissingImports]
from typer.testing import CliRunner

from deployment import CLIENTS, NODES, Deployment, free_port, project, simulated, start_run
from fedprior.cli import app
from fedprior.federation.keys import node_key

slow = pytest.mark.slow
BEYOND = 20_000  # bytes of Flower's a message, at most, beside the blob: records, object tree, acknowledgements


@slow
def test_three_supernodes_give_the_bits_and_the_bytes_of_the_simulation(tmp_path: Path) -> None:
    """With error feedback, so that states on the nodes' disks matter."""
    task = project(tmp_path / "job", "fp.topk(lr=0.1, fraction=0.2)")
    with Deployment(tmp_path) as d:
        for partition in range(NODES):
            d.node(partition, NODES)
        printed = start_run(d, tmp_path)
        traffic = d.call("traffic", str(tmp_path / "out"), d.address)
        states = list((tmp_path / "job").glob("*/client-*"))
    want = simulated(task)
    saved, history = checkpoint.read(tmp_path / "out"), records.read(tmp_path / "out" / "records.jsonl")
    assert saved is not None, printed
    assert equal(saved.eta, tree.flatten(want.eta))
    assert without_seconds(history) == without_seconds(want.history)
    assert len(states) == len({c.index for r in want.history for c in r.clients})
    check_traffic(traffic, want)


def check_traffic(text: str, want: fp.Result) -> None:
    """Flower's total holds every upload, and the broadcast once a node, with a bounded surplus a message."""
    lines = [
        [int(n.replace(",", "")) for n in line.split(": ")[1].split(" ")[::3][:2]]
        for line in text.splitlines()
        if " up" in line and " down" in line
    ]
    (up, down), (flower_up, flower_down) = lines
    assert (up, down) == (want.bytes_up, want.bytes_down)
    per_round = [{c.index % NODES: c.bytes_down for c in r.clients} for r in want.history]
    sent, messages = sum(sum(r.values()) for r in per_round), NODES + sum(map(len, per_round))
    assert up < flower_up < up + BEYOND * messages
    assert sent < flower_down < sent + BEYOND * messages


def test_init_writes_a_project_that_fits_flowers_limits(tmp_path: Path) -> None:
    task = project(tmp_path / "job", "fp.fedavg(lr=0.2)")
    assert len(task.clients(1, NODES)) == CLIENTS
    for path in (tmp_path / "job").rglob("*.*"):
        assert path.suffix in (".py", ".toml", ".md")
    again = CliRunner().invoke(app, ["federate", "init", str(tmp_path / "job")])
    assert again.exit_code == 2 and "is not empty" in again.stderr


def test_keys(tmp_path: Path) -> None:
    """The server's certificate is the CA's, for its names; private keys are their owner's alone, and stay."""
    folder = tmp_path / "keys"
    made = CliRunner().invoke(app, ["federate", "keys", str(folder), "--host", "10.0.0.5", "--host", "fl.example.org"])
    assert made.exit_code == 0, made.output
    ca, server = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.pem"))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["localhost", "127.0.0.1", "10.0.0.5", "fl.example.org"]
    private = [folder / name for name in ("ca.key", "server.key", "node-0", "node-1", "node-2")]
    assert all(path.stat().st_mode & 0o077 == 0 for path in private)
    assert len({path.read_bytes() for path in folder.glob("node-*.pub")}) == 3
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = CliRunner().invoke(app, ["federate", "keys", str(folder)])
    assert again.exit_code == 2 and "never overwritten" in again.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["superlink"], "write --keys DIR"),
        (["superlink", "--insecure", "--keys", "x"], "not both"),
        (["superlink", "--keys", "/nowhere"], "ca.crt"),
        (["supernode", "a:1", "--partition", "3", "--partitions", "3", "--insecure"], "between 0 and 2"),
        (["run", ".", "a:1"], "write --keys DIR"),
    ],
)
def test_insecure_has_to_be_asked_for(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["federate", *arguments])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") <= 2


REFUSED = {  # who -> what its log says; where a key has no owner, the SuperLink's says whose it was
    "unregistered": "[code: 2004] Failed to activate SuperNode",
    "no-key": "[code: 2001] SuperNode authentication is enabled",
    "other-ca": "CERTIFICATE_VERIFY_FAILED",
    "no-tls": "Connection attempt failed",
}


def says(d: Deployment, name: str, text: str) -> None:
    """Wait for it."""
    for _ in range(600):
        if text in d.log(name):
            return
        time.sleep(0.1)
    raise TimeoutError(f"{name} does not say {text!r}: {d.log(name)}")


@slow
def test_nobody_joins_without_a_key(tmp_path: Path) -> None:
    """Two nodes whose keys were registered run; the third partition is claimed by four that may not, one by one."""
    keys, others = tmp_path / "keys", tmp_path / "others"
    for folder in (keys, others):
        CliRunner().invoke(app, ["federate", "keys", str(folder), "--nodes", "2"], catch_exceptions=False)
    secure = ("--keys", str(keys))
    task = project(tmp_path / "job", "fp.fedavg(lr=0.2)")
    with Deployment(tmp_path, *secure) as d:
        d.call("register", d.address)
        stranger = tmp_path / "stranger"  # has the CA, and a key that nobody registered
        stranger.mkdir()
        shutil.copy(keys / "ca.crt", stranger)
        node_key(stranger / "node-0")
        d.node(0, 2, ("--keys", str(stranger)), "unregistered")
        other_ca = tmp_path / "other-ca"  # has a registered key, and trusts another CA
        other_ca.mkdir()
        shutil.copy(others / "ca.crt", other_ca)
        shutil.copy(keys / "node-0", other_ca)
        d.node(0, 2, ("--keys", str(other_ca)), "other-ca")
        d.node(0, 2, ("--insecure",), "no-tls")
        bare = ["--superlink", d.address, "--root-certificates", str(keys / "ca.crt"), "--port", str(free_port())]
        d.program("no-key", "flower-supernode", *bare, "--node-config", "partition-id=0 num-partitions=2")
        for name, text in REFUSED.items():
            says(d, name, text)
        public = serialization.load_ssh_public_key((stranger / "node-0.pub").read_bytes())
        owner = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        says(d, "superlink", f"{owner!r}, exception: No SuperNode found with the given public key")
        refused = start_run(d, tmp_path, rounds=1, nodes=2, seconds=12, out=str(tmp_path / "refused"))
        assert "there is no node of the partitions [0, 1]" in refused
        assert not list((tmp_path / "refused").glob("checkpoint*"))
        logs = {name: d.log(name) for name in REFUSED}
        d.stop(*logs)
        for partition in range(2):
            d.node(partition, 2)
        start_run(d, tmp_path, rounds=1, nodes=2)
    history = records.read(tmp_path / "out" / "records.jsonl")
    want = simulated(task, rounds=1)
    assert without_seconds(history) == without_seconds(want.history)
    assert "insecure" in logs["no-tls"] and "anybody can" in logs["no-tls"]
    for name, log in logs.items():
        assert {who for who, text in REFUSED.items() if text in log} <= {name, "no-tls"}, name  # its own processes, too
        assert "SuperNode ID" not in log, name
