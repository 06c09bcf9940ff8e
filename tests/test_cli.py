"""The command line, on tiny runs of the digits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedprior
from fedprior import compare, config
from fedprior.cli import app
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
TINY = """
[run]
rounds = 3
cohort = 2
[data]
name = "digits"
clients = 5
holdout = 0.2
[algorithm]
name = "fedprox"
precision = 2
batch_size = "none"
"""
SMALL = ["--rounds", "2", "--clients", "5", "--cohort", "2", "--quiet"]


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*arguments):
    """The one line on stderr of a command that is refused."""
    result = call(*arguments, code=2)
    assert "Traceback" not in result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("fedprior: "), result.stderr
    return result.stderr


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
    assert all(name in shown for name in [*fedprior.ALGORITHMS, "SpikeSlab", "arXiv:1602.05629"])
    shown = call("data").stdout
    assert all(name in shown for name in ("fashion-mnist", "shakespeare", "digits", "fedprior[data]"))


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
        options = ["--algorithms", "fedavg,fedprox", "--rounds", "40", "--clients", "20", "--cohort", "4"]
        return [sys.executable, "-m", "fedprior", "compare", "digits", *options, "--out", str(out), *more]

    process = subprocess.Popen(command(tmp_path / "two"), stderr=subprocess.PIPE, text=True)
    records = tmp_path / "two" / "fedprox" / "records.jsonl"
    while process.poll() is None and not (records.exists() and len(records.read_text().splitlines()) > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.count("\n") == 1 and "--resume" in error, error
    done = [json.loads(line)["number"] for line in records.read_text().splitlines()]
    assert 2 < len(done) < 40
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


REFUSED = {
    "dataset": (["compare", "digts"], "did you mean 'digits'"),
    "algorithm": (["compare", "digits", "--algorithms", "fedavg,fedporx"], "did you mean 'fedprox'"),
    "twice": (["compare", "digits", "--algorithms", "fedavg,fedavg"], "once"),
    "partition": (["compare", "digits", "--partition", "dirichet"], "did you mean 'dirichlet'"),
    "model": (["compare", "digits", "--model", "lent"], "did you mean 'lenet'"),
    "cohort": (["compare", "digits", "--clients", "3"], "cohort must be between 1 and the 3 clients, got 10"),
    "rounds": (["compare", "digits", "--rounds", "0"], "rounds must be at least 1, got 0"),
    "alpha": (["compare", "digits", "--alpha", "0"], "alpha must be positive"),
    "seed": (["compare", "digits", "--seed", "-1"], "seed"),
    "dropout": (["compare", "digits", "--dropout", "1"], "dropout"),
    "epochs": (["compare", "digits", "--epochs", "0"], "epochs"),
    "too many clients": (["compare", "digits", "--clients", "5000"], "5000 clients"),
    "no keys": (["compare", "digits", "--partition", "by_key"], "keys"),
    "too small": (["compare", "digits", "--model", "lenet"], "too small for lenet"),
    "no fit": (["compare", "digits", "--model", "char_gru"], "char_gru"),
    "missing data": (["compare", "fashion-mnist", "--folder", "/nowhere"], "/nowhere"),
    "missing file": (["compare", "/nowhere/mine.csv", "--target", "y"], "No such file"),
    "no target": (["compare", "/nowhere/mine.csv"], "target"),
    "resume": (["compare", "digits", "--resume"], "--out"),
    "preset": (["run", "digit"], "did you mean 'digits'"),
    "no toml": (["run", "/nowhere/my.toml"], "No such file"),
    "no run": (["run", "digits", "--resume", "/nowhere"], "holds no run"),
    "no records": (["report", "/nowhere"], "holds no records"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_user_can_mend_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, text = REFUSED[name]
    assert text in refused(*arguments)
    assert not list(tmp_path.iterdir())


BROKEN = {
    "syntax": ("[run]\nrounds = \n", "line 2"),
    "section": ("[runs]\n", "did you mean 'run'"),
    "no section": ("rounds = 3\n", "unknown section 'rounds'"),
    "key": ("[run]\nround = 3\n", "did you mean 'rounds'"),
    "algorithm key": ('[algorithm]\nname = "fedavg"\nprecision = 1\n', "unknown key in [algorithm] 'precision'"),
    "type": ('[run]\nrounds = "3"\n', "rounds in [run] must be int, got '3'"),
    "truth": ("[run]\nrounds = true\n", "rounds in [run] must be int"),
    "literal": ('[algorithm]\nweighting = "all"\n', "weighting in [algorithm]"),
    "tuple": ('[model]\nname = "mlp"\nhidden = [1.5]\n', "hidden in [model]"),
    "device": ('[run]\ncohort = 2\ndevice = "tpu"\n[data]\nname = "digits"', "device 'tpu'"),
    "availability": ("[availability]\ndropout = 2\n", "dropout"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_toml_names_the_place(name, toml, tmp_path):
    toml.write_text(BROKEN[name][0])
    line = refused("run", toml, "--out", tmp_path / "out")
    assert BROKEN[name][1] in line and not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(toml, compared):
    assert "Not a directory" in refused("run", toml, "--out", toml / "below")
    assert "holds results already" in refused("run", toml, "--out", compared)
    assert "holds results already" in refused("compare", "digits", *SMALL, "--out", compared)


def test_a_sparse_prior_on_a_model_without_units(toml, tmp_path):
    toml.write_text(TINY.replace("fedprox", "fedsparse").replace("precision = 2", "") + '[model]\nname = "softmax"\n')
    assert "can be gated" in refused("run", toml, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_refused_before_a_round(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    text = refused("compare", "digits", "--algorithms", "fedavg,fedsparse", *SMALL, "--out", tmp_path / "out")
    assert "pip install 'fedprior[sparse]'" in text and not (tmp_path / "out").exists()


def test_without_matplotlib_a_comparison_has_all_but_the_report(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = call("compare", "digits", "--algorithms", "fedavg", *SMALL, "--out", tmp_path / "out").stdout
    assert "pip install 'fedprior[report]'" in shown and (tmp_path / "out" / "results.json").exists()


def test_a_run_that_diverges_is_reported(tmp_path):
    call("compare", "digits", "--algorithms", "fedavg", "--lr", "1e30", *SMALL, "--out", tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert row["rounds"] == 2 and (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, ValueError])
def test_a_bug_keeps_its_traceback_and_ctrl_c_has_none(monkeypatch, toml, tmp_path, interrupted):
    def load(data, seed):
        if interrupted is KeyboardInterrupt:
            raise KeyboardInterrupt
        return ()

    monkeypatch.setattr(compare, "_load", load)
    result = CliRunner().invoke(app, ["run", str(toml), "--out", str(tmp_path / "out")])
    if interrupted is KeyboardInterrupt:
        assert result.exit_code == 130 and result.stderr == "fedprior: stopped\n"
    else:
        assert result.exit_code == 1 and isinstance(result.exception, ValueError)
        assert "unpack" in str(result.exception)


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
