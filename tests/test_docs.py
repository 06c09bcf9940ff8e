"""What is printed in the docs is run: every python block of a page, in order, in one namespace."""

import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import fedprior as fp
from cases import classification_clients, redraw
from cli_calls import call
from fedprior import config, tree
from fedprior.privacy.secure_sum import SecureSum

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
INDEX = (ROOT / "docs/algorithms/README.md").read_text()
CLIENTS = classification_clients((14, 9, 11))
MODEL = redraw(nn.Sequential(nn.Linear(4, 64), nn.GroupNorm(32, 64), nn.ReLU(), nn.Linear(64, 3)).double()).float()
NEEDS = {"fednsl": fp.models.rules(4, 3)}  # what an algorithm asks of its model


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    assert blocks or page.name not in ("README.md", "add_a_prior.md")
    namespace: dict = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_toml_blocks_are_configurations(page, tmp_path):
    for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.M | re.S):
        assert config.parse(tomllib.loads(block), tmp_path).sections().keys() >= tomllib.loads(block).keys()


SUMMARY = r"^ *(\w+): nats ([\d.]+), accuracy ([\d.]+); ([\d.]+) MB up, ([\d.]+) MB down, ([\d,]+) of"


def test_the_readme_prints_what_its_script_prints(capsys):
    """Within 3 points of accuracy and 10 % of the bytes."""
    readme = (ROOT / "README.md").read_text()
    (script,) = re.findall(r"^```python\n(.*?fp.data.load.*?)^```", readme, re.M | re.S)
    exec(compile(script, "README.md", "exec"), {"__name__": "docs"})
    printed, wanted = (re.findall(SUMMARY, text, re.M) for text in (capsys.readouterr().out, readme))
    assert [p[0] for p in printed] == [w[0] for w in wanted] == ["fedavg", "fedsparse"]
    for got, want in zip(printed, wanted, strict=True):
        assert float(got[2]) == pytest.approx(float(want[2]), abs=0.03)
        assert [float(v) for v in got[3:5]] == pytest.approx([float(v) for v in want[3:5]], rel=0.1)


METRICS = (ROOT / "docs/metrics.md").read_text()


def test_the_page_of_metrics_shows_the_table_that_its_command_prints(tmp_path):
    """Within 5 points of accuracy: client counts and columns are the same."""
    (command,) = re.findall(r"^    fedprior (compare (?:.*\\\n)*.*)$", METRICS, re.M)
    shown = call(*shlex.split(command.replace("\\\n", " ")), "--out", tmp_path / "out").stdout
    row = r"^ *│ (\w+) +│ (\d+ \w+) +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │$"
    printed, wanted = (re.findall(row, text, re.M) for text in (shown, METRICS))
    assert [p[:2] for p in printed] == [w[:2] for w in wanted] and len(wanted) == 4
    for got, want in zip(printed, wanted, strict=True):
        assert [float(v) for v in got[2:]] == pytest.approx([float(v) for v in want[2:]], abs=0.05)
    titles = r"^ *┃ algorithm ┃ clients .*$"
    assert re.findall(titles, METRICS, re.M)[0].strip() in shown


def test_the_page_of_metrics_prints_what_its_scripts_print(capsys):
    namespace: dict = {}
    for script in re.findall(r"^```python\n(.*?)^```", METRICS, re.M | re.S):
        exec(compile(script, "metrics.md", "exec"), namespace)
    lines = capsys.readouterr().out.splitlines()
    wanted = re.findall(r"^    ([\w' ]+: .*\d\.\d\d)$", METRICS, re.M)
    assert len(lines) == len(wanted) == 4
    for got, want in zip(lines, wanted, strict=True):
        number = r"\d\.\d\d"
        assert re.sub(number, "", got) == re.sub(number, "", want)
        numbers, expected = ([float(v) for v in re.findall(number, text)] for text in (got, want))
        assert numbers == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def sum_only(algorithm: fp.Algorithm) -> str:
    """Whether the algorithm takes a secure sum; if so two rounds with the usual bound are those in the open."""
    try:
        summed = replace(algorithm, secure=SecureSum(most=20))
    except ValueError:
        return "no"
    model = NEEDS.get(algorithm.name, MODEL)
    plain, secure = (fp.run(a, model, CLIENTS, rounds=2, progress=False) for a in (algorithm, summed))
    assert {c.status for r in secure.history for c in r.clients} == {"ok"}
    assert [r.layer["within"] for r in secure.history] == [1.0, 1.0] and "warning" not in secure.summary()
    got, want = tree.flatten(secure.eta), tree.flatten(plain.eta)
    for name, value in want.items():
        assert float((got[name] - value).abs().max()) <= 5e-3 * float(value.abs().max()) + 1e-5, name
    return "yes"


def personal(algorithm: fp.Algorithm) -> str:
    """Whether a part of the prior stays with the client, or the E-step has a model of the client's own."""
    parts = getattr(algorithm.prior, "parts", {"*": algorithm.prior}).values()
    if any(hasattr(part, "kept") for part in parts):
        return "kept"
    return "own" if hasattr(algorithm.inference, "personal") else ""


@pytest.mark.parametrize("name", fp.ALGORITHMS)
def test_every_algorithm_has_a_page_and_a_true_row(name):
    make = fp.ALGORITHMS[name]
    algorithm, what = make(), (make.__doc__ or "").splitlines()[0].split(": ", 1)[-1]
    prior, e_step = (type(part).__name__ for part in (algorithm.prior, algorithm.inference))
    (link,) = re.findall(rf"^\| \[{name}\]\((\w+\.md)\) ", INDEX, re.M)
    row = f"| [{name}]({link}) | {what} | {prior} | {e_step} | {sum_only(algorithm)} | {personal(algorithm)} |"
    assert row in INDEX.splitlines()
    page = (ROOT / "docs/algorithms" / link).read_text()
    assert re.search(rf"^[^#\n]*\bfp\.{name}\b", "".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)), re.M)
    for part in ("**When to use it.**", "**Reference.**"):
        assert part in page


def test_the_index_lists_algorithms_in_order_and_all_pages():
    rows = re.findall(r"^\| \[(\w+)\]\((\w+\.md)\)", INDEX, re.M)
    assert [name for name, _ in rows] == list(fp.ALGORITHMS)
    assert {page for _, page in rows} == {p.name for p in (ROOT / "docs/algorithms").glob("*.md")} - {"README.md"}
