"""What is printed in the docs is run: every python block of a page, in order, in one namespace."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    assert blocks or page.name not in ("README.md", "add_a_prior.md")
    namespace: dict = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)


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


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
