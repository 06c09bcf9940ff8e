"""The command line, on tiny runs of the digits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedprior
from cli_calls import SMALL, TINY, call, refused
from fedprior import compare, config
from fedprior.records import read

KEYS = {
    "algorithm",
    "accuracy",
    "nats",
    "bytes_up",
    "bytes_down",
    "parameters",
    "parameters_left",
    "seconds",
    "rounds",
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "out"
    call("compare", "digits", "--algorithms", "fedavg,fedsparse", "--dropout", "0.3", *SMALL, "--out", folder)
    return folder


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(TINY)
    return path


def test_version_algorithms_and_data_are_shown():
    assert call("--version").stdout.strip() == f"fedprior {fedprior.__version__}"
    shown = call("algorithms").stdout
    assert all(name in shown for name in [*fedprior.ALGORITHMS, "SharedGates(density=0.", "arXiv:1602.05629"])
    shown = call("data").stdout
    assert all(name in shown for name in ("fashion-mnist", "shakespeare", "digits", "fedprior[data]"))
    assert call("data", "digits", "--quiet").stdout == ""


def test_data_that_is_not_here_is_exit_code_1(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDPRIOR_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = {source.name: source.found for source in fedprior.data.available()}
    for name, here in found.items():
        assert call("data", name, code=0 if here else 1).stdout


def test_results_are_those_of_the_records(compared):
    rows = json.loads((compared / "results.json").read_text())
    assert [row["algorithm"] for row in rows] == ["fedavg", "fedsparse"]
    for row in rows:
        rounds = read(compared / row["algorithm"] / "records.jsonl")
        assert set(row) == KEYS
        assert row["bytes_up"] == sum(c.bytes_up for r in rounds for c in r.clients) > 0
        assert row["bytes_down"] == sum(c.bytes_down for r in rounds for c in r.clients) > 0
        assert {"accuracy": row["accuracy"], "nats": row["nats"]} == rounds[-1].metrics
        assert row["parameters_left"] == rounds[-1].parameters_left <= row["parameters"]
        assert row["rounds"] == len(rounds) == 2
        assert row["seconds"] == sum(r.seconds + r.seconds_evaluate for r in rounds)
        assert compare.row_of_records(compared / row["algorithm"]) == row


def test_algorithms_start_from_the_same_model_and_clients(compared):
    first, second = (config.read(compared / name / "run.toml") for name in ("fedavg", "fedsparse"))
    assert first.model == second.model and first.data == second.data and first.run == second.run
    asked = [
        [[c.client for c in r.clients] for r in read(compared / name / "records.jsonl")]
        for name in ("fedavg", "fedsparse")
    ]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("name", ["fedavg", "fedsparse"])
def test_a_run_toml_gives_the_same_bits(compared, tmp_path, name):
    call("run", compared / name / "run.toml", "--out", tmp_path / "again", "--quiet")
    for file in ("model.safetensors", "clients.json", "run.toml"):
        assert (tmp_path / "again" / file).read_bytes() == (compared / name / file).read_bytes()


def test_a_run_toml_is_complete(toml, tmp_path):
    shown = call("run", toml, "--out", tmp_path / "out").stdout
    assert "fedprox" in shown and "MB up" in shown
    written = config.read(tmp_path / "out" / "run.toml")
    assert config.to_toml(written) == (tmp_path / "out" / "run.toml").read_text()
    assert written.algorithm.arguments == {
        "lr": 0.05,
        "precision": 2.0,
        "epochs": 1,
        "batch_size": None,
        "weighting": "examples",
    }
    assert written.model == config.Call("mlp", {"inputs": 64, "hidden": (64,), "classes": 10, "seed": 0})
    assert written.data.partition == "dirichlet"


def test_a_longer_run_goes_on_from_a_shorter_one(toml, tmp_path):
    call("run", toml, "--out", tmp_path / "two", "--quiet")
    toml.write_text(TINY.replace("rounds = 3", "rounds = 5"))
    call("run", toml, "--resume", tmp_path / "two", "--quiet")
    call("run", toml, "--out", tmp_path / "one", "--quiet")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert [r.number for r in read(tmp_path / "two" / "records.jsonl")] == [1, 2, 3, 4, 5]
    toml.write_text(TINY)
    assert "5 rounds already" in refused("run", toml, "--resume", tmp_path / "two")


def test_an_interrupted_comparison_resumes_to_the_same_bits(tmp_path):
    def command(out, *more):
        options = ["--algorithms", "fedavg,fedprox", "--rounds", "30", "--clients", "20", "--cohort", "3"]
        return [sys.executable, "-m", "fedprior", "compare", "digits", *options, "--out", str(out), *more]

    process = subprocess.Popen(command(tmp_path / "two"), stderr=subprocess.PIPE, text=True)
    records = tmp_path / "two" / "fedprox" / "records.jsonl"
    while process.poll() is None and not (records.exists() and len(records.read_text().splitlines()) > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.count("\n") == 1 and "--resume" in error, error
    done = [json.loads(line)["number"] for line in records.read_text().splitlines()]
    assert 2 < len(done) < 30
    first = (tmp_path / "two" / "fedavg" / "records.jsonl").read_bytes()
    assert "--resume" in refused(*command(tmp_path / "two")[3:])
    call(*command(tmp_path / "two", "--resume", "--quiet")[3:])
    call(*command(tmp_path / "one", "--quiet")[3:])
    for name in ("fedavg", "fedprox"):
        one, two = ((tmp_path / out / name / "model.safetensors").read_bytes() for out in ("one", "two"))
        assert one == two
    assert (tmp_path / "two" / "fedavg" / "records.jsonl").read_bytes() == first
    assert len(json.loads((tmp_path / "two" / "results.json").read_text())) == 2


def test_a_comparison_can_grow_but_not_change(compared, tmp_path):
    options = ["--out", compared, "--resume", *SMALL, "--dropout", "0.3"]
    before = (compared / "fedavg" / "records.jsonl").read_bytes()
    call("compare", "digits", "--algorithms", "fedavg,fedsparse", *options)
    assert (compared / "fedavg" / "records.jsonl").read_bytes() == before
    text = refused("compare", "digits", "--algorithms", "fedavg", *options, "--alpha", "0.5")
    assert "alpha in [data] was 1.0 and is now 0.5" in text
    assert "lr in [algorithm]" in refused("compare", "digits", "--algorithms", "fedavg", *options, "--lr", "1")


def test_a_table_of_the_users_own(tmp_path):
    lines = ["a,b,owner,kind"] + [f"{i % 7},{i % 3},site-{i % 4},{'xyz'[i % 3]}" for i in range(80)]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    options = ["--target", "kind", "--client", "owner", "--cohort", "2", "--rounds", "2", "--algorithms", "fedavg"]
    call("compare", tmp_path / "mine.csv", *options, "--out", tmp_path / "out", "--model", "softmax")
    written = config.read(tmp_path / "out" / "fedavg" / "run.toml")
    assert written.data.partition == "by_key" and written.data.clients == 4
    assert written.model.arguments["inputs"] == 2 and written.model.arguments["classes"] == 3
    options += ["--model", "softmax", "--out", tmp_path / "numbers"]
    options[1] = "b"
    (tmp_path / "mine.csv").write_text(
        "\n".join(lines).replace(",0,", ",0.5,").replace("kind", "c").translate({120: "7", 121: "8", 122: "9"})
    )
    call("compare", tmp_path / "mine.csv", *options, "--quiet")
    (row,) = json.loads((tmp_path / "numbers" / "results.json").read_text())
    assert set(row) == KEYS and row["accuracy"] is None and row["nats"] > 0


@pytest.mark.parametrize("name", fedprior.ALGORITHMS)
def test_every_algorithm_is_a_toml(name, tmp_path):
    parsed = config.parse({"algorithm": {"name": name}}, tmp_path)
    (tmp_path / "run.toml").write_text(config.to_toml(parsed))
    assert config.read(tmp_path / "run.toml") == parsed
    assert parsed.make_algorithm().name == name


@pytest.mark.parametrize(
    "path", sorted((Path(fedprior.__file__).parent / "presets").glob("*.toml")), ids=lambda p: p.stem
)
def test_presets_are_understood(path):
    preset = config.read(path)
    assert config.parse(preset.sections(), path.parent) == preset
