"""The page: tables, plots as data URIs, and the configurations. No script, no address outside the page."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from typing import get_args

from fedprior import personalised
from fedprior.records import Status
from fedprior.report.tracks import Track, metric_of
from fedprior.rows import cells

_TITLES = {
    "accuracy": "{metric} against rounds",
    "accuracy_bytes": "{metric} against bytes",
    "bytes": "Bytes per round",
    "density": "Parameters left",
    "clients": "{metric} of each client",
}
_CAPTIONS = {
    "accuracy": "The model after each evaluated round, on the test set.",
    "accuracy_bytes": "The same, against all that was sent in both directions. 1 MB is 10<sup>6</sup> bytes.",
    "bytes": "Lengths of the payloads from and to the round's clients. 1 MB is 10<sup>6</sup> bytes.",
    "density": "The part of the model's parameters that is still alive.",
    "clients": "The final model on each client, {on}; a flat curve treats all clients alike.",
}
_REASONS = 10
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th { border-bottom: 2px solid #888 } th:first-child, td:first-child, td.text { text-align: left }
figure { margin: 0 } img { max-width: 100%; height: auto } figcaption, .note { color: #555; font-size: .9rem }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem } .wide { overflow-x: auto }
"""


def page(tracks: list[Track], images: Mapping[str, bytes]) -> str:
    """The whole document."""
    names = ", ".join(t.name for t in tracks)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>fedprior: {escape(names)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>fedprior: {escape(names)}</h1>",
        _results(tracks),
        _personalised(tracks),
        *(_figure(name, png, tracks) for name, png in images.items()),
        _lost(tracks),
        _configurations(tracks),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _results(tracks: list[Track]) -> str:
    head = ["algorithm", "accuracy", "nats", "MB up", "MB down", "parameters left", "seconds", "rounds"]
    body = [cells(t.row) for t in tracks]
    note = "nats: negative log-likelihood per test example. MB: 10<sup>6</sup> bytes of payload, all rounds."
    return _table(head, body) + f'<p class="note">{note}</p>'


def _personalised(tracks: list[Track]) -> str:
    """Clients before and after they adapt, if examples of theirs were held out."""
    with_rows = [t for t in tracks if t.personalised]
    if not with_rows:
        return ""
    score = personalised.score_of([row for t in with_rows for row in t.personalised])
    body = [line for t in with_rows for line in personalised.cells(t.name, t.personalised, score)]
    note = (
        f"Means over up to {personalised.MOST} clients, each on its held-out examples. Before: the model as it "
        "arrives, with the client's own parameters if it keeps any. After: once it has trained on its examples. "
        "Worst decile: a tenth of the clients do no better. Seen: took part in a round."
    )
    title = "<h2>Clients before and after they adapt</h2>"
    return f'{title}{_table(personalised.titles(score), body)}<p class="note">{note}</p>'


def _figure(name: str, png: bytes, tracks: list[Track]) -> str:
    metric = {"accuracy": "Accuracy", "nats": "Negative log-likelihood"}[metric_of(tracks)]
    on = {str(c.get("on")) for t in tracks for c in t.clients}
    where = {"held_out": "on its held-out examples", "training": "on its training examples"}
    caption = _CAPTIONS[name].format(on=" or ".join(where[o] for o in sorted(on & where.keys())))
    title = _TITLES[name].format(metric=metric)
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    image = f'<img src="{source}" alt="{escape(title)}">'
    return f"<h2>{escape(title)}</h2><figure>{image}<figcaption>{caption}</figcaption></figure>"


def _lost(tracks: list[Track]) -> str:
    """How many clients were lost, why, and the reasons of refused payloads."""
    statuses = get_args(Status)
    head = ["algorithm", "asked", *statuses]
    body, reasons = [], []
    for t in tracks:
        clients = [c for r in t.rounds for c in r.clients]
        count = Counter(c.status for c in clients)
        body.append([t.name, f"{len(clients):,}", *(f"{count[s]:,}" for s in statuses)])
        refused = [f"round {r.number}: {c.reason}" for r in t.rounds for c in r.lost() if c.reason]
        more = [f"and {len(refused) - _REASONS:,} more"] if len(refused) > _REASONS else []
        reasons += [f"<li>{escape(t.name)}, {escape(text)}</li>" for text in refused[:_REASONS] + more]
    note = (
        "Dropped: never answered. Late: after the deadline. Both are simulated, unless a reason is given below. "
        "Rejected: its payload was refused. Failed: its training raised an error on its node."
    )
    listed = f"<ul>{''.join(reasons)}</ul>" if reasons else ""
    return f'<h2>Clients lost</h2>{_table(head, body)}<p class="note">{note}</p>{listed}'


def _configurations(tracks: list[Track]) -> str:
    texts = [
        f"<details><summary>{escape(t.name)}</summary><pre>{escape(t.toml)}</pre></details>" for t in tracks if t.toml
    ]
    return "<h2>Configurations</h2>" + "".join(texts) if texts else ""


def _table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'
