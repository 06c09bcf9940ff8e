"""Clients before and after they adapt, in a run's folder, in what is printed and in the report."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

import fedprior as fp
from cli_calls import call
from fedprior import config, finished, metrics, personalised, report
from fedprior.compare import build

INDEX = (Path(__file__).parent.parent / "docs/algorithms/README.md").read_text()
FEDPER = """
[run]
rounds = 2
cohort = 3
[data]
name = "digits"
clients = 6
holdout = 0.2
[algorithm]
name = "fedper"
lr = 0.1
"""
SMALL = ["--rounds", "1", "--clients", "5", "--cohort", "5"]


def table(rows, score):
    """Kind -> the numbers that are printed for it, in the order of the columns."""
    spreads = {kind: metrics.over_clients(some) for kind, some in metrics.by_seen(rows).items()}
    columns = [(f"{when}_{score}", of) for when in ("before", "after") for of in ("mean", "worst_decile")]
    return {kind: [f"{spread[name][of]:.4f}" for name, of in columns] for kind, spread in spreads.items()}


def printed(text, name):
    """The same, of the lines of an algorithm that count clients."""
    lines = re.findall(rf"^│ {name} +│ (\d+) (\w+) +│ +(\S+) │ +(\S+) │ +(\S+) │ +(\S+) │$", text, re.M)
    return {kind: (int(count), numbers) for count, kind, *numbers in lines}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fedper")
    (folder / "my.toml").write_text(FEDPER)
    shown = call("run", folder / "my.toml", "--out", folder / "out").stdout
    return folder / "out", shown


def test_the_file_holds_the_rows_of_the_result(ran):
    folder, _ = ran
    result, settings = finished.load(folder)
    clients = build(settings).clients
    assert json.loads((folder / "personalised.json").read_text()) == result.personalised(clients)
    assert personalised.read(folder) == result.personalised(clients)


def test_clients_json_is_before(ran):
    """A client that keeps a head of its own is evaluated with it, and not with the server's."""
    folder, _ = ran
    rows = zip(json.loads((folder / "clients.json").read_text()), personalised.read(folder), strict=True)
    for whole, row in rows:
        for name in ("accuracy", "nats"):
            assert whole[name] == pytest.approx(row[f"before_{name}"], rel=1e-6)
    assert result_of_the_server(folder) != pytest.approx([r["before_nats"] for r in personalised.read(folder)])


def result_of_the_server(folder):
    result, settings = finished.load(folder)
    held = (c.held_out for c in build(settings).clients)
    return [metrics.evaluate(result.objective, result.params, some).means()["nats"] for some in held]


def test_the_run_prints_seen_and_unseen_clients(ran):
    folder, shown = ran
    rows = personalised.read(folder)
    counts = {kind: len(some) for kind, some in metrics.by_seen(rows).items()}
    assert set(counts) == {"seen", "unseen"}
    assert printed(shown, "fedper") == {k: (counts[k], numbers) for k, numbers in table(rows, "accuracy").items()}
    assert all(text in shown for text in ("accuracy before", "accuracy after", "worst decile", personalised.TITLE))
    assert personalised.BLIND not in shown


def test_the_report_shows_what_the_run_prints(ran):
    folder, _ = ran
    text = report.write(folder).read_text()
    for kind, numbers in table(personalised.read(folder), "accuracy").items():
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        assert re.search(rf"<td>fedper</td><td>\d {kind}</td>{re.escape(cells)}", text)


def test_a_resumed_run_writes_the_same_bytes(ran):
    folder, _ = ran
    before = (folder / "personalised.json").read_bytes()
    for name in ("personalised.json", "results.json"):
        (folder / name).unlink()
    call("run", folder / "run.toml", "--resume", folder, "--quiet")
    assert (folder / "personalised.json").read_bytes() == before


def test_a_comparison_prints_each_algorithm(tmp_path):
    shown = call("compare", "digits", "--algorithms", "fedavg,ditto", *SMALL, "--holdout", "0.2", "--out", tmp_path)
    for name in ("fedavg", "ditto"):
        rows = personalised.read(tmp_path / name)
        assert printed(shown.stdout, name) == {"seen": (5, table(rows, "accuracy")["seen"])}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td>5 seen</td>") == 2 and "Clients before and after they adapt" in page


def test_without_held_out_examples_one_line_says_how_to_get_them(tmp_path):
    """Only for algorithms whose clients end with models of their own; there is no file, and no table."""
    shown = call("compare", "digits", "--algorithms", "fedavg,fedper,ditto", *SMALL, "--out", tmp_path / "two").stdout
    (line,) = [text for text in shown.splitlines() if personalised.BLIND in text]
    assert line.startswith("fedper, ditto: ") and line.endswith("--holdout 0.2")
    (tmp_path / "my.toml").write_text(FEDPER.replace("holdout = 0.2\n", ""))
    shown = call("run", tmp_path / "my.toml", "--out", tmp_path / "run").stdout
    (line,) = [text for text in shown.splitlines() if personalised.BLIND in text]
    assert line.startswith("fedper: ") and line.endswith("holdout = 0.2 in [data]")
    assert not list(tmp_path.rglob("personalised.json")) and personalised.TITLE not in shown
    assert "before and after" not in report.write(tmp_path / "run").read_text()
    (tmp_path / "my.toml").write_text(FEDPER.replace("holdout = 0.2\n", "").replace("fedper", "fedavg"))
    assert personalised.BLIND not in call("run", tmp_path / "my.toml", "--out", tmp_path / "avg").stdout


def test_clients_that_are_too_small_are_not_told_to_hold_out(tmp_path):
    """1,437 images for 900 clients: one or two each."""
    few = ["--rounds", "1", "--clients", "900", "--cohort", "3", "--partition", "iid", "--out", tmp_path]
    shown = call("compare", "digits", "--algorithms", "fedper", *few).stdout
    assert personalised.BLIND not in shown and "fedper" in shown


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2, 2), (3,), (1, 2, 7)], ids=str)
def test_who_could_hold_out_does_when_asked(sizes):
    keys = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    some = fp.data.from_arrays(torch.zeros(len(keys), 2), torch.zeros(len(keys)).long(), keys=keys)
    asked = fp.data.by_key(some, holdout=personalised.HOLDOUT)
    rows = [{"client": "", "examples": size, "on": "train"} for size in sizes]
    assert personalised.could_hold_out(rows) == any(c.held_out is not None and len(c.held_out) for c in asked)


@pytest.mark.parametrize("name", fp.ALGORITHMS)
def test_models_of_their_own_are_those_of_the_index(name, tmp_path):
    (cell,) = re.findall(rf"^\| \[{name}\]\(.* \| ([^|]*)\|$", INDEX, re.M)
    algorithm = config.parse({"algorithm": {"name": name}}, tmp_path).make_algorithm()
    assert personalised.has_own(algorithm) == bool(cell.strip())


def test_only_clients_with_held_out_examples_and_only_the_first(tmp_path, monkeypatch):
    """A client of one or two examples keeps them for training, and says nothing about what it would predict."""
    monkeypatch.setattr(personalised, "MOST", 4)
    train, _ = fp.data.load("digits")
    sizes = (30, 2, 40, 1, 50)
    keys = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    some = fp.data.from_arrays(train.x[: len(keys)], train.y[: len(keys)], keys=keys)
    clients = fp.data.by_key(some, holdout=0.2)
    result = fp.run(fp.fedavg(), fp.models.mlp(64, (8,)), clients, rounds=1, cohort=2)
    personalised.write(result, clients, tmp_path)
    expected = [i for i in range(4) if round(0.2 * sizes[i]) > 0]
    assert [row["client"] for row in personalised.read(tmp_path)] == [clients[i].name for i in expected]


def test_numbers_that_are_not_finite_and_targets_without_classes(tmp_path):
    rows = [{"client": "a", "examples": 2, "on": "held_out", "seen": "no"}]
    rows[0] |= {f"{when}_{k}": v for when in ("before", "after") for k, v in (("nats", 1.0), ("squared_error", None))}
    (tmp_path / "personalised.json").write_text(json.dumps(rows))
    (read,) = personalised.read(tmp_path)
    assert math.isnan(read["after_squared_error"]) and read["after_nats"] == 1
    assert personalised.score_of([read]) == "squared_error"
    assert personalised.titles("squared_error")[2::2] == ["squared error before", "squared error after"]
    assert personalised.cells("x", [read], "nats") == [["x", "1 unseen", *["1.0000"] * 4]]
    assert set(personalised.cells("x", [read], "squared_error")[0][2:]) == {"–"}  # noqa: RUF001
    (tmp_path / "personalised.json").write_text("{")
    with pytest.raises(ValueError, match=r"personalised\.json is not a list of clients"):
        personalised.read(tmp_path)
