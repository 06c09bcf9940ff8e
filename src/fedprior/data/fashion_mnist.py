"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747) from its four IDX files.

    x  pixels / 255, in [0, 1]      (60000 or 10000, 1, 28, 28) float32
    y  the class, 0 .. 9            (60000 or 10000,) int64

Looked for, gzipped or not, in $FEDPRIOR_DATA/fashion-mnist, ~/.cache/fedprior/fashion-mnist, the
folder of the Debian package, and torchvision's FashionMNIST/raw below $FEDPRIOR_DATA and the cache.
Other sets of the same format (MNIST) load with `folder`.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from fedprior.core import Examples
from fedprior.data.places import cache_folders, first

HOW = "apt-get install dataset-fashion-mnist"
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_TORCHVISION = Path("FashionMNIST", "raw")
_PARTS = ("train", "t10k")
_FILES = [f"{part}-{what}" for part in _PARTS for what in ("images-idx3", "labels-idx1")]


def find(folder: str | Path | None = None) -> Path:
    """The folder with all four files; FileNotFoundError if there is none."""
    if folder is not None:
        given = Path(folder).expanduser()
        return first("fashion-mnist", HOW, [given, given / _TORCHVISION], _complete)
    roots = cache_folders()
    places = [
        *(root / "fashion-mnist" for root in roots),
        _DEBIAN,
        *(root / _TORCHVISION for root in roots),
    ]
    return first("fashion-mnist", HOW, places, _complete)


def load(folder: str | Path | None = None) -> tuple[Examples, Examples]:
    """Train and test examples."""
    place = find(folder)
    train, test = (_part(place, part) for part in _PARTS)
    return train, test


def read_idx(path: str | Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file (gzipped if its name ends in .gz)."""
    path = Path(path)
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is torn or corrupt ({error}); fetch it again") from error
    axes = data[3] if len(data) >= 4 else 0
    if data[:3] != b"\x00\x00\x08" or axes == 0 or len(data) < 4 + 4 * axes:
        raise ValueError(f"{path} is not an IDX file of bytes: it begins with {data[:4].hex(' ')!r}")
    shape = tuple(np.frombuffer(data, ">u4", axes, offset=4).tolist())
    want, got = int(np.prod(shape, dtype=object)), len(data) - 4 - 4 * axes
    if got != want:
        raise ValueError(f"{path} is torn or corrupt: its header says {shape}, {want} bytes, and {got} follow")
    return np.frombuffer(data, np.uint8, want, offset=4 + 4 * axes).reshape(shape)


def _path(folder: Path, name: str) -> Path | None:
    names = [f"{name}-ubyte.gz", f"{name}-ubyte"]
    return next((folder / n for n in names if (folder / n).is_file()), None)


def _complete(folder: Path) -> bool:
    return all(_path(folder, name) for name in _FILES)


def _part(folder: Path, part: str) -> Examples:
    paths = _path(folder, f"{part}-images-idx3"), _path(folder, f"{part}-labels-idx1")
    images, labels = (read_idx(path) for path in paths if path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"{paths[0]} has shape {images.shape} and {paths[1]} {labels.shape}; "
            "they should be (n, height, width) and (n,)"
        )
    x = torch.from_numpy(images.astype(np.float32)).div_(255).unsqueeze(1)
    return Examples(x, torch.from_numpy(labels.astype(np.int64)))
