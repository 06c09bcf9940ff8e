"""Personal state of clients, by client index; a missing state is a new client.

A state saved in round n counts from round n + 1 on. Until the round is committed the states of earlier rounds are
kept, so that a run resumed at an earlier checkpoint finds what it had.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedprior.core import Params
from fedprior.records import write_atomically


class ClientStore(Protocol):
    """Where states live. An engine never keeps one."""

    def holds_any(self) -> bool:
        """Is there a state of any client?"""
        ...

    def load(self, index: int) -> Params | None:
        """The newest state of a client."""
        ...

    def save(self, index: int, number: int, state: Params) -> None:
        """The state of a client after round `number`."""
        ...

    def commit(self, number: int) -> None:
        """Round `number` will not be run again: older states may go."""
        ...

    def rollback(self, number: int) -> None:
        """Forget the states saved after round `number`."""
        ...


class MemoryStore:
    """States in memory, gone with the process."""

    def __init__(self) -> None:
        self._states: dict[int, list[tuple[int, Params]]] = {}

    def holds_any(self) -> bool:
        """Is there a state of any client?"""
        return any(self._states.values())

    def load(self, index: int) -> Params | None:
        """The newest state."""
        versions = self._states.get(index)
        return dict(versions[-1][1]) if versions else None

    def save(self, index: int, number: int, state: Params) -> None:
        """Append a version."""
        self._states.setdefault(index, []).append((number, {k: v.detach().clone() for k, v in state.items()}))

    def commit(self, number: int) -> None:
        """Keep the newest version up to `number`, and all after it."""
        for index, versions in self._states.items():
            old = [v for v in versions if v[0] <= number]
            self._states[index] = old[-1:] + versions[len(old) :]

    def rollback(self, number: int) -> None:
        """Drop versions after `number`."""
        kept = {i: [v for v in versions if v[0] <= number] for i, versions in self._states.items()}
        self._states = {i: versions for i, versions in kept.items() if versions}


class DiskStore:
    """One safetensors file a client and version: `client-17.round-5.safetensors`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._versions: dict[int, list[int]] = {}
        for path in folder.glob("client-*.safetensors"):
            if match := re.fullmatch(r"client-(\d+)\.round-(\d+)\.safetensors", path.name):
                self._versions.setdefault(int(match[1]), []).append(int(match[2]))
        for versions in self._versions.values():
            versions.sort()

    def _path(self, index: int, number: int) -> Path:
        return self._folder / f"client-{index}.round-{number}.safetensors"

    def holds_any(self) -> bool:
        """Is there a state of any client?"""
        return any(self._versions.values())

    def newest(self, index: int) -> int:
        """The round of a client's newest state; 0 if it has none."""
        return max(self._versions.get(index, ()), default=0)

    def load(self, index: int) -> Params | None:
        """The newest state."""
        versions = self._versions.get(index)
        if not versions:
            return None
        path = self._path(index, versions[-1])
        try:
            return load(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"the state of client {index} in {path} is torn: {error}") from error

    def save(self, index: int, number: int, state: Params) -> None:
        """Write a version."""
        write_atomically(self._path(index, number), save({k: v.detach().contiguous() for k, v in state.items()}))
        versions = self._versions.setdefault(index, [])
        if number not in versions:
            versions.append(number)

    def commit(self, number: int) -> None:
        """Delete all but the newest version up to `number`, and keep all after it."""
        for index, versions in self._versions.items():
            old = [v for v in versions if v <= number]
            for version in old[:-1]:
                self._path(index, version).unlink(missing_ok=True)
            self._versions[index] = old[-1:] + versions[len(old) :]

    def rollback(self, number: int) -> None:
        """Delete versions after `number`."""
        for index, versions in list(self._versions.items()):
            for version in [v for v in versions if v > number]:
                self._path(index, version).unlink(missing_ok=True)
            self._versions[index] = [v for v in versions if v <= number]
