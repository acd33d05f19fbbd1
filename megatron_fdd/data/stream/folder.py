"""The folder of a stream: its window, and the files of one data-parallel replica of the student."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fdd.data.store.segment import SUFFIX
from megatron_fdd.data.store.whole_file import UNFINISHED, give_name, remove_old, sync_folder, unfinished
from megatron_fdd.data.stream.sign import read_sign
from megatron_fdd.host.disk import writing
from megatron_fdd.host.json_file import read_json, write_json

_STREAM = "stream"
_ENTRY = re.compile(r"(?:(\d{12})\.)?([0-9a-f]{32})\.(asked|claim|safetensors)")


@dataclass(slots=True)
class Listing:
    """The files of a replica by name: the places of asks, claims and segments."""

    asks: dict[str, int] = field(default_factory=dict)
    claims: set[str] = field(default_factory=set)
    segments: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class ReplicaFolder:
    """The files of one data-parallel replica of the student.

    Attributes:
        store: the store's folder.
        replica: its number.
    """

    store: Path
    replica: int

    @property
    def path(self) -> Path:
        """The folder."""
        return self.store / _STREAM / str(self.replica)

    @property
    def student(self) -> Path:
        """The student's sign of life."""
        return self.path / "student.json"

    def segment(self, name: str) -> Path:
        """Return the place of an answer."""
        return self.path / f"{name}{SUFFIX}"

    def claim(self, name: str) -> Path:
        """Return the place of a claim."""
        return self.path / f"{name}.claim"

    def ask(self, place: int, name: str) -> Path:
        """Return the place of an ask."""
        return self.path / f"{place:012d}.{name}.asked"

    def write_ask(self, place: int, name: str, content: bytes) -> None:
        """Write an ask, whole or not at all.

        Raises:
            ValueError: the disk cannot take it.
        """
        with writing("--fdd-teacher-store", self.store):
            self.path.mkdir(parents=True, exist_ok=True)
            part = self.path / f".{name}.asked.part"
            part.write_bytes(content)
            os.replace(part, self.ask(place, name))

    def listing(self) -> Listing:
        """Return what is there now."""
        found = Listing()
        for entry in _names(self.path):
            if match := _ENTRY.fullmatch(entry):
                place, name, kind = match.groups()
                if kind == "asked" and place is not None:
                    found.asks[name] = int(place)
                elif kind == "claim":
                    found.claims.add(name)
                elif kind == "safetensors":
                    found.segments.add(name)
        return found

    def unfinished(self) -> list[Path]:
        """Return what producers are writing, or were when they were killed."""
        return [self.path / entry for entry in _names(self.path) if entry.endswith(UNFINISHED)]

    def clear(self, kept: Container[str] = ()) -> None:
        """Remove all asks and claims, and all answers but some; what a producer writes just now stays."""
        for entry in list(_names(self.path)):
            match = _ENTRY.fullmatch(entry)
            if match and not (match[3] == "safetensors" and match[2] in kept):
                (self.path / entry).unlink(missing_ok=True)


def replicas(store: Path) -> list[ReplicaFolder]:
    """Return the replicas that have a folder, by number."""
    numbers = sorted(int(name) for name in _names(store / _STREAM) if name.isdecimal())
    return [ReplicaFolder(store, number) for number in numbers]


def producer_path(store: Path, name: str) -> Path:
    """Return the place of a producer's sign of life."""
    return store / _STREAM / "producers" / f"{name}.json"


def producers(store: Path) -> dict[str, dict[str, Any]]:
    """Return the signs of life of all producers, by name."""
    names = [name for name in _names(store / _STREAM / "producers") if not name.startswith(".")]
    signs = {Path(name).stem: read_sign(store / _STREAM / "producers" / name) for name in names}
    return {name: sign for name, sign in signs.items() if sign is not None}


def left_path(store: Path) -> Path:
    """Return the place of the last sign of life of the producer that left last."""
    return store / _STREAM / "left.json"


def describe_left(store: Path) -> str:
    """Say which producer left last, and when by the time of its file; empty where none has."""
    path = left_path(store)
    with contextlib.suppress(OSError):
        seconds, sign = max(0.0, time.time() - path.stat().st_mtime), read_sign(path) or {}
        return f"; the last one to leave was {sign.get('name')}, {seconds:.0f} s ago, {sign.get('answered')} answered"
    return ""


def sweep_stream(store: Path) -> int:
    """Remove what producers left that were killed more than a day ago: signs of life and claims put aside; count it."""
    folder = store / _STREAM
    return remove_old([*folder.glob("producers/*.json"), *folder.glob("*/.*.claim.*")])


def window_bytes(store: Path) -> int | None:
    """Return the bytes of a stream's window; None if the store has no stream.

    Raises:
        ValueError: the file is damaged.
    """
    path = _window_path(store)
    if not path.exists():
        return None
    found = read_json(path).get("bytes")
    if type(found) is not int or found < 1:
        raise ValueError(f"{path}: has no number of bytes; remove it, and start fdd teach --follow again")
    return found


def write_window(store: Path, num_bytes: int) -> None:
    """Make a store a stream, or join one.

    Raises:
        ValueError: it has another window, or the disk cannot take the file.
    """
    path = _window_path(store)
    if not path.exists():
        with unfinished(store, path) as place:
            write_json(place, {"bytes": num_bytes})
            give_name(place, path)
            sync_folder(path.parent)
    there = window_bytes(store)
    if there != num_bytes:
        raise ValueError(
            f"--window-bytes {num_bytes}: the stream in {store} has a window of {there} bytes; give the same, or end "
            f"its producers and its training and remove {path}"
        )


def _window_path(store: Path) -> Path:
    return store / _STREAM / "window.json"


def _names(folder: Path) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name
