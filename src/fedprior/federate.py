"""The command line's federations: a project to run, keys, and Flower's programs with the settings that fit them.

The commands print what they run, and become it. Flower's telemetry and update check are off, and nothing is installed
while a run lasts: nodes have what `pip install 'fedprior[flower]'` gave them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fedprior.records import read
from fedprior.refusals import one_line
from fedprior.run import RECORDS

app = typer.Typer(help="Real federations on Flower.", no_args_is_help=True)
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # seconds, and 1 by default; much less costs a core in polling
}

Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS and keys: anybody can read, change and join.")]
Keys = Annotated[Path | None, typer.Option(help="Folder written by `fedprior federate keys`, or this machine's part.")]
Address = Annotated[str, typer.Argument(help="HOST:PORT of the SuperLink.")]


@app.command()
@one_line
def init(folder: Annotated[Path, typer.Argument(help="A new folder for the project.", metavar="DIR")]) -> None:
    """Write a project for `flwr run`: an algorithm, a model, and the data of a node."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose another folder")
    with as_file(files("fedprior.federation") / "template") as template:
        shutil.copytree(template, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    typer.echo(f"{folder}: change {folder / 'job' / 'task.py'}, and see {folder / 'README.md'}")


@app.command()
@one_line
def keys(
    folder: Annotated[Path, typer.Argument(help="A new folder for the keys.", metavar="DIR")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address of the server; may be repeated.")] = None,
    nodes: Annotated[int, typer.Option(help="Nodes that get a key.", min=1)] = 3,
    days: Annotated[int, typer.Option(help="That the certificates are valid.", min=1)] = 90,
) -> None:
    """Make a development CA, the server's certificate, and one key a node."""
    from fedprior.federation.keys import write

    write(folder, host or [], nodes, days)
    typer.echo(
        f"{folder}: the server needs all of it but ca.key (keep that offline) and the nodes' keys; node 0 needs ca.crt "
        "and node-0, over a safe channel"
    )


@app.command()
@one_line
def superlink(
    keys: Keys = None,
    insecure: Insecure = False,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    database: Annotated[str | None, typer.Option(help="File of Flower's state.", show_default="in memory")] = None,
) -> None:
    """Run the server's SuperLink; with --keys, only nodes whose key was registered may join."""
    command = ["flower-superlink", "--host", host, "--port", str(port), "--disable-runtime-dependency-installation"]
    if (folder := _secured(keys, insecure)) is None:
        command += ["--insecure"]
    else:
        names = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.pem", "--ssl-keyfile": "server.key"}
        command += [word for option, name in names.items() for word in (option, str(_file(folder, name)))]
        command += ["--enable-supernode-auth"]
    _become([*command, *(["--database", database] if database else [])])


@app.command()
@one_line
def supernode(
    server: Address,
    partition: Annotated[int, typer.Option(help="Which node this is, from 0.", min=0)],
    partitions: Annotated[int, typer.Option(help="How many nodes there are.", min=1)],
    keys: Keys = None,
    insecure: Insecure = False,
    port: Annotated[int, typer.Option(help="A free port of this machine, for its own processes.")] = 9094,
) -> None:
    """Run a node's SuperNode; with --keys, its key is the folder's node-PARTITION."""
    if partition >= partitions:
        raise ValueError(f"partition must be between 0 and {partitions - 1}, got {partition}")
    place = f"partition-id={partition} num-partitions={partitions}"
    command = ["flower-supernode", "--superlink", server, "--port", str(port), "--node-config", place]
    if (folder := _secured(keys, insecure)) is None:
        command += ["--insecure"]
    else:
        command += ["--root-certificates", str(_file(folder, "ca.crt"))]
        command += ["--auth-supernode-private-key", str(_file(folder, f"node-{partition}"))]
    _become(command)


@app.command()
@one_line
def register(server: Address, keys: Keys = None) -> None:
    """Tell the SuperLink which nodes may join: all node-*.pub of a folder of keys."""
    folder = _secured(keys, False)
    assert folder is not None
    if not (public := sorted(folder.glob("node-*.pub"))):
        raise ValueError(f"{folder} has no node-*.pub: register where `fedprior federate keys` wrote them")
    with _connection(server, folder) as home:
        command = [_program("flwr"), "supernode", "register"]
        refused = [p.name for p in public if subprocess.run([*command, str(p), "server"], env=_env(home)).returncode]
    if refused:
        raise ValueError(
            f"{len(refused)} of {len(public)} keys were not registered now ({', '.join(refused)}), and Flower says why "
            "above; one that is already in use may join already"
        )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@one_line
def run(
    context: typer.Context,
    project: Annotated[Path, typer.Argument(help="A folder written by `fedprior federate init`.", metavar="DIR")],
    server: Address,
    keys: Keys = None,
    insecure: Insecure = False,
) -> None:
    """Start a run; further options go to `flwr run`, such as --stream or --run-config 'rounds=5'."""
    with _connection(server, _secured(keys, insecure)) as home:
        command = [_program("flwr"), "run", str(project), "server", *context.args]
        raise typer.Exit(subprocess.run(command, env=_env(home)).returncode)


@app.command()
@one_line
def traffic(
    folder: Annotated[Path, typer.Argument(help="The run's folder, on the server.", metavar="DIR")],
    server: Address,
    keys: Keys = None,
    insecure: Insecure = False,
) -> None:
    """Show the payload bytes of a run beside what Flower counted for its messages."""
    about = json.loads((folder / "federation.json").read_text(encoding="utf-8"))
    rounds = read(folder / RECORDS)
    up, down = sum(r.bytes_up for r in rounds), sum(r.bytes_down for r in rounds)
    flower_up = flower_down = 0
    with _connection(server, _secured(keys, insecure)) as home:
        for number in about["flower"]:
            command = [_program("flwr"), "list", "server", "--run-id", str(number), "--format", "json"]
            listed = subprocess.run(command, env=_env(home), check=True, capture_output=True, text=True).stdout
            if "runs" not in (answer := json.loads(listed)):
                why = answer.get("error-message", listed).splitlines()[-1]
                raise ValueError(
                    f"the SuperLink at {server} does not tell of run {number}: {why} One without --database forgets "
                    "its runs when it stops"
                )
            counted = answer["runs"][0]["network-traffic"]
            flower_up += counted["inbound-bytes"]
            flower_down += counted["outbound-bytes"]
    typer.echo(
        f"payloads of {len(rounds)} rounds: {up:,} bytes up, {down:,} down\n"
        f"Flower's messages: {flower_up:,} bytes up, {flower_down:,} down (a broadcast goes once to a node, for all "
        "its clients; greetings, headers and acknowledgements are in here)"
    )


def _secured(keys: Path | None, insecure: bool) -> Path | None:
    """The folder of keys, or None with a warning."""
    if (keys is None) != insecure:
        raise ValueError(
            "write --keys DIR (made by `fedprior federate keys`), or --insecure for a trial on one machine"
            + (", not both" if insecure else "")
        )
    if insecure:
        typer.echo("fedprior: --insecure: no TLS and no keys, so anybody can read, change and join", err=True)
    return keys


def _file(folder: Path, name: str) -> Path:
    path = (folder / name).absolute()
    if not path.exists():
        why = "No such file; `fedprior federate keys`, run once on the server, makes it: copy it from there"
        raise FileNotFoundError(2, why, str(path))
    return path


def _connection(server: str, keys: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder with Flower's configuration for this server, under the name "server"."""
    home = tempfile.TemporaryDirectory(prefix="fedprior-")
    secured = "insecure = true" if keys is None else f"root-certificates = {json.dumps(str(_file(keys, 'ca.crt')))}"
    text = f'[superlink]\ndefault = "server"\n[superlink.server]\naddress = {json.dumps(server)}\n{secured}\n'
    (Path(home.name) / "config.toml").write_text(text, encoding="utf-8")
    return home


def _env(home: str | None = None) -> dict[str, str]:
    """This process's environment, in which Flower keeps to itself."""
    bin = str(Path(sys.executable).parent)  # Flower starts its own programs by name
    path = os.pathsep.join([bin, os.environ.get("PATH", "")])
    return {**QUIET, **os.environ, "PATH": path, **({"FLWR_HOME": home} if home else {})}


def _program(name: str) -> str:
    path = shutil.which(name, path=_env()["PATH"])
    if path is None:
        raise ModuleNotFoundError(
            f"{name} is not installed: pip install 'fedprior[flower]', in an environment of its own"
        )
    return path


def _become(command: list[str]) -> NoReturn:
    program = _program(command[0])
    typer.echo(" ".join(command), err=True)
    os.execve(program, command, _env())
