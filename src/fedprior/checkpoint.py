"""Checkpoints: eta and the server step's state as safetensors, the rest as JSON, each written atomically.

`checkpoint.json` names the tensor file it belongs to and is renamed into place last: a crash at any moment leaves
the previous checkpoint or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from fedprior.core import Params
from fedprior.records import write_atomically

INDEX = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round.

    Attributes:
        number: the last finished round.
        eta: flat (tree.flatten).
        server: the server step's state.
        setting: what the run was started with; a resumed run must match.
    """

    number: int
    eta: Params
    server: Params
    setting: Mapping[str, Any]

    def tensors(self) -> bytes:
        """eta and the server step's state as safetensors."""
        tensors = {f"eta:{k}": v for k, v in self.eta.items()} | {f"server:{k}": v for k, v in self.server.items()}
        return save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})

    @classmethod
    def of(cls, number: int, tensors: bytes, setting: Mapping[str, Any]) -> Checkpoint:
        """The inverse of `tensors`."""
        parts: dict[str, Params] = {"eta": {}, "server": {}}
        for key, value in load(tensors).items():
            kind, name = key.split(":", 1)
            parts[kind][name] = value
        return cls(number, parts["eta"], parts["server"], setting)

    def write(self, folder: Path) -> None:
        """Write, then remove older tensor files."""
        data = self.tensors()
        name = _name(self.number)
        write_atomically(folder / name, data)
        index = {"number": self.number, "tensors": name, "sha256": _digest(data), "setting": dict(self.setting)}
        write_atomically(folder / INDEX, json.dumps(index, indent=1).encode())
        for old in folder.glob("checkpoint-*.safetensors"):
            if old.name != name:
                old.unlink()


def read(folder: Path) -> Checkpoint | None:
    """The checkpoint of a run, or None if it has not written one yet.

    Raises:
        ValueError: if the files are damaged.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        number, setting = index["number"], index["setting"]
        if index["tensors"] != _name(number) or not isinstance(setting, dict):
            raise ValueError(f"{INDEX} was changed after it was written")
        data = (folder / index["tensors"]).read_bytes()
        if _digest(data) != index["sha256"]:
            raise ValueError(f"{index['tensors']} was changed after it was written")
        return Checkpoint.of(number, data, setting)
    except (OSError, KeyError, TypeError, ValueError) as error:
        why = f"{INDEX} has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"the checkpoint in {folder} is damaged: {why}; put the file back, or start again in another folder"
        ) from error


def _name(number: int) -> str:
    """The tensor file of a round; a ValueError for what is no number of a round."""
    return f"checkpoint-{number:06d}.safetensors"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
