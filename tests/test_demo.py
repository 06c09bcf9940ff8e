"""The table in the README is what the demo prints, within the tolerance stated there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedprior.data import available

ROOT = Path(__file__).parent.parent
ACCURACY, RELATIVE_BYTES = 0.02, 0.15


def printed() -> dict[str, dict[str, float]]:
    """algorithm -> the README's numbers."""
    rows = re.findall(r"^ *│ (\w+) +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +([\d,]+) ", README, re.M)
    keys = ("accuracy", "nats", "bytes_up", "bytes_down", "parameters_left")
    numbers = {
        name: dict(zip(keys, (float(v.replace(",", "")) for v in values), strict=True)) for name, *values in rows
    }
    return {k: v | {b: v[b] * 1e6 for b in ("bytes_up", "bytes_down")} for k, v in numbers.items()}


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_states_the_tolerances_that_are_tested():
    assert set(printed()) == {"fedavg", "fedsparse"}
    assert f"within {100 * ACCURACY:.0f} points of accuracy and {100 * RELATIVE_BYTES:.0f} % of the bytes" in README


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not any(s.found for s in available() if s.name == "fashion-mnist"), reason="the README shows Fashion-MNIST"
)
def test_the_demo_prints_the_readme_table(tmp_path):
    out = tmp_path / "demo"
    subprocess.run(["sh", ROOT / "demo.sh", Path(sys.executable).parent, out], check=True, cwd=tmp_path)
    rows = {row["algorithm"]: row for row in json.loads((out / "results.json").read_text())}
    for name, want in printed().items():
        assert rows[name]["accuracy"] == pytest.approx(want["accuracy"], abs=ACCURACY)
        for key in ("bytes_up", "bytes_down", "parameters_left"):
            assert rows[name][key] == pytest.approx(want[key], rel=RELATIVE_BYTES)
    assert (out / "report.html").stat().st_size > 10_000
