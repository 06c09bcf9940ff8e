"""The report: from records alone, and self-contained."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from fedprior import config, report
from fedprior.cli import app
from fedprior.compare import build, compare
from fedprior.config import Call
from fedprior.records import ClientRecord, Round
from fedprior.report import tracks

SECTIONS = {
    "run": {"rounds": 3, "cohort": 3},
    "data": {"name": "digits", "clients": 6, "holdout": 0.2},
    "availability": {"dropout": 0.3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    experiment = build(config.parse(SECTIONS, folder))
    calls = [config.parse({"algorithm": {"name": n}}, folder).algorithm for n in ("fedsparse", "fedavg")]
    assert all(isinstance(call, Call) for call in calls)
    compare(experiment, calls, folder, progress=False)
    report.write(folder)
    return folder


class Page(HTMLParser):
    """The addresses and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [(tag, value or "") for key, value in attrs if key in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    images = [source for tag, source in page.sources if tag == "img"]
    assert len(images) == len(page.sources) == 5
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in images)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", text)


def test_the_page_has_the_numbers_of_the_records(folder):
    text = Page((folder / "report.html").read_text()).text
    for row in json.loads((folder / "results.json").read_text()):
        assert f"{row['accuracy']:.4f}" in text and f"{row['bytes_up'] / 1e6:,.2f}" in text
    track = report.read(folder)[0]
    lost = sum(len(r.lost()) for r in track.rounds)
    assert lost > 0
    assert track.toml in text


def test_the_order_is_that_of_the_results(folder):
    assert [t.name for t in report.read(folder)] == ["fedsparse", "fedavg"]


def test_it_is_rebuilt_from_the_records_alone(folder, tmp_path):
    again = tmp_path / "again"
    for path in folder.rglob("*"):
        if path.name in ("results.json", "records.jsonl", "clients.json", "personalised.json", "run.toml"):
            (again / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, again / path.relative_to(folder))
    assert CliRunner().invoke(app, ["report", str(again)]).exit_code == 0
    written = sorted(p.name for p in folder.iterdir() if p.suffix in (".png", ".html"))
    assert written == ["accuracy.png", "accuracy_bytes.png", "bytes.png", "clients.png", "density.png", "report.html"]
    for name in written:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_single_and_an_unfinished_run(folder, tmp_path):
    shutil.copytree(folder / "fedavg", tmp_path / "one")
    page = report.write(tmp_path / "one").read_text()
    for name in ("results.json", "clients.json"):
        (tmp_path / "one" / name).unlink()
    lines = (tmp_path / "one" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one" / "records.jsonl").write_text("".join(lines[:2]))
    (track,) = report.read(tmp_path / "one")
    assert track.row["rounds"] == 2 and track.row["parameters"] == 4810
    assert page.count("<img") == 5 and report.write(tmp_path / "one").read_text().count("<img") == 4


def test_bare_records_of_the_library_and_hostile_names(tmp_path):
    place = tmp_path / "<b>$x^$"
    place.mkdir()
    name, reason = '<script>alert("1")</script>', "client '<i>': torn & bad"
    clients = (ClientRecord(0, name, "rejected", 3, 10, 20, 0.1, reason), ClientRecord(1, "b", "ok", 3, 10, 20, 0.1))
    rounds = [Round(n + 1, 20, 40, 5, 0.1, 0.0, {"nats": 1.0 / (n + 1)}, clients) for n in range(12)]
    (place / "records.jsonl").write_text("".join(r.to_json() + "\n" for r in rounds))
    text = report.write(place).read_text()
    page = Page(text)
    assert not {"script", "i", "b"} & set(page.tags)
    assert reason in page.text and "and 2 more" in page.text and "<b>$x^$" in page.text
    assert (place / "accuracy.png").exists() and not (place / "density.png").exists()


def test_damaged_records_are_one_line(folder, tmp_path):
    shutil.copytree(folder / "fedavg", tmp_path / "one")
    (tmp_path / "one" / "results.json").write_text("{")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "one")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "results.json" in result.stderr


def test_megabytes_are_those_of_both_directions_so_far(folder):
    for track in tracks.read(folder):
        _, _, megabytes = track.evaluated("accuracy")
        ends = [i for i, r in enumerate(track.rounds, 1) if r.metrics]
        assert megabytes == pytest.approx(
            [sum(r.bytes_up + r.bytes_down for r in track.rounds[:end]) / 1e6 for end in ends]
        )
