"""Errors of the command line: one line and exit code 2 for what the user can mend."""

import json
import sys

import pytest
from typer.testing import CliRunner

from cli_calls import SMALL, TINY, call, refused
from fedprior import cli, compare
from fedprior.cli import app


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(TINY)
    return path


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
    "literal": (
        '[algorithm]\nweighting = "all"\n',
        "weighting in [algorithm] must be 'uniform' or 'examples', got 'all'",
    ),
    "tuple": ('[model]\nname = "mlp"\nhidden = [1.5]\n', "hidden in [model]"),
    "device": ('[run]\ncohort = 2\ndevice = "tpu"\n[data]\nname = "digits"', "device 'tpu'"),
    "availability": ("[availability]\ndropout = 2\n", "dropout"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_toml_names_the_place(name, toml, tmp_path):
    toml.write_text(BROKEN[name][0])
    line = refused("run", toml, "--out", tmp_path / "out")
    assert BROKEN[name][1] in line and not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(toml, tmp_path):
    assert "Not a directory" in refused("run", toml, "--out", toml / "below")
    call("compare", "digits", "--algorithms", "fedavg", *SMALL, "--out", tmp_path / "out")
    assert "holds results already" in refused("run", toml, "--out", tmp_path / "out")
    assert "holds results already" in refused("run", toml, "--out", tmp_path / "out" / "fedavg")
    assert "holds results already" in refused("compare", "digits", *SMALL, "--out", tmp_path / "out")


def test_classes_below_zero_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("a,kind\n" + "1,-1\n2,1\n" * 20)
    assert "numbered from 0 up" in refused("compare", "mine.csv", "--target", "kind", "--clients", "4", "--cohort", "2")


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


@pytest.mark.parametrize("arguments", [["--bogus"], ["compare", "digits", "--rounds", "abc"], ["compare"], ["nothing"]])
def test_what_cannot_be_read_is_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fedprior", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert err.startswith("fedprior: ") and err.count("\n") == 1


def test_a_comparison_that_learnt_nothing_says_so(tmp_path):
    size = ["--rounds", "2", "--clients", "4", "--cohort", "2", "--deadline-seconds", "1e-9"]
    result = call("compare", "digits", "--algorithms", "fedavg", *size, "--out", str(tmp_path / "late"))
    assert "fedprior: fedavg: in 2 of 2 rounds the model was not updated (clients: 4 late)" in result.stderr


def test_classes_that_are_identifiers_are_refused(tmp_path):
    path = tmp_path / "ids.csv"
    path.write_text("a,owner,label\n" + "".join(f"{i},{i % 3},{10**15 * (i % 3)}\n" for i in range(30)))
    columns = ["--target", "label", "--client", "owner", "--cohort", "2"]
    line = refused("compare", str(path), *columns, "--out", str(tmp_path / "ids"))
    assert "3 classes with numbers up to 2000000000000000" in line
