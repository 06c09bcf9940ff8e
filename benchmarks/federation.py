"""Seconds of a round on a federation of this machine: three SuperNodes, with and without the process that stays.

    make .venv-flower/.installed && .venv-flower/bin/python benchmarks/federation.py [ROUNDS]

"Flower alone" answers each message with what it holds and adds nothing up; the other two are `fedprior federate init`,
as it is and with a ClientApp that imports PyTorch and loads the data for each message.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fedprior import records

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

NODES = 3
ECHO = """
from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train("fedprior")
def answer(message, context):
    return Message(message.content, reply_to=message)
"""
LOOP = """
import json, time
from pathlib import Path
from flwr.serverapp import ServerApp
from fedprior_node import mail

app = ServerApp()

@app.main()
def main(grid, context):
    config, seconds = context.run_config, []
    while len(nodes := list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.1)
    for number in range(1, config["rounds"] + 1):
        began = time.monotonic()
        waiting = set(grid.push_messages([mail.request(n, number, bytes([number]) * 20_000, 600) for n in nodes]))
        while waiting:
            waiting -= {m.metadata.reply_to_message_id for m in grid.pull_messages(list(waiting))}
            time.sleep(0.1)
        seconds.append(time.monotonic() - began)
    Path(config["out"]).mkdir()
    (Path(config["out"]) / "seconds.json").write_text(json.dumps(seconds))
"""
EACH = """
from fedprior.federation import client_app
from job.task import ALGORITHM, MODEL, clients

app = client_app(ALGORITHM, clients, MODEL)
"""
CASES = {
    "Flower alone": {"client_app.py": ECHO, "server_app.py": LOOP},
    "the process that stays": {},
    "a process for each message": {"client_app.py": EACH},
}


def seconds(files: dict[str, str], rounds: int) -> list[float]:
    """Of each round but the first, in which workers start."""
    from deployment import FEDPRIOR, Deployment  # of the tests

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([*FEDPRIOR, "federate", "init", str(folder / "job")], check=True, capture_output=True)
        for path, text in files.items():
            (folder / "job" / "job" / path).write_text(text)
        out = folder / "out"
        with Deployment(folder) as d:
            for partition in range(NODES):
                d.node(partition, NODES)
            config = f'rounds={rounds + 1} cohort=8 nodes={NODES} out="{out}"'
            printed = d.call("run", str(folder / "job"), d.address, "--stream", "--run-config", config, code=None)
        if (told := out / "seconds.json").exists():
            return json.loads(told.read_text())[1:]
        assert (out / "records.jsonl").exists(), printed
        return [r.seconds for r in records.read(out / "records.jsonl")][1:]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the federation would stay
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    print("| on each node | seconds a round | least | most |\n|---|---|---|---|")
    for case, files in CASES.items():
        took = seconds(files, rounds)
        print(f"| {case} | {statistics.median(took):.2f} | {min(took):.2f} | {max(took):.2f} |", flush=True)
