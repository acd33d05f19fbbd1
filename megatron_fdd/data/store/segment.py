"""Segments: ordinary safetensors files with the features of some units, whole or not there.

N units of M tokens in all, of T blocks; P bytes a packed hidden state. Tensors:

    keys     uint8 [N, 16]
    lengths  int64 [N]
    ids      int32 [M]
    states   uint8 [M T P]; unit by unit, each [T, S, P]: one block's range of tokens is one range of bytes
    sums     uint64 [...]; unit by unit, each [T, ceil(S / 64)]: XXH3 of each block's 64 tokens
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save_file

from megatron_fdd.data.store.identity import FORMAT, VERSION
from megatron_fdd.data.store.unit import KEY_BYTES, as_ids, unit_key
from megatron_fdd.host.disk import writing

Bytes = NDArray[np.uint8]

SUFFIX = ".safetensors"
SEGMENTS = "segments"
# The remedy of damage.
REPAIR = "fdd store check --remove-damaged, and then fdd teach, which makes it anew"
# How many tokens one sum covers.
SUM_TOKENS = 64
_DTYPES = {"keys": "U8", "lengths": "I64", "ids": "I32", "states": "U8", "sums": "U64"}
# No header of ours is longer.
_LONGEST_HEADER = 1 << 16
_STALE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of a segment's tensors: first byte and number of bytes in the file."""

    size: int
    keys: tuple[int, int]
    lengths: tuple[int, int]
    ids: tuple[int, int]
    states: tuple[int, int]
    sums: tuple[int, int]


class SegmentWriter:
    """A writer of units, which gathers them and writes a file when enough are there.

    A file appears when it is whole and on disk. A producer that is killed loses what it gathered, and no more. The
    same units make a file of the same name, so that two producers may write them both.

    Args:
        store: the store's folder.
        digest: of its identity.
        num_blocks, token_bytes: T and P.
        most_units, most_bytes: how much is gathered for a file.
    """

    def __init__(
        self,
        store: Path,
        digest: str,
        num_blocks: int,
        token_bytes: int,
        *,
        most_units: int = 64,
        most_bytes: int = 128 << 20,
    ) -> None:
        self._store, self._digest = store, digest
        self._num_blocks, self._token_bytes = num_blocks, token_bytes
        self._most_units, self._most_bytes = most_units, most_bytes
        self._units: list[tuple[NDArray[np.int32], Bytes]] = []
        self._num_bytes = 0

    def add(self, ids: NDArray[np.int32], states: Bytes) -> None:
        """Take a unit: its ids [S], and its packed hidden states [T, S, P].

        Raises:
            ValueError: the disk cannot take the file.
        """
        assert states.shape == (self._num_blocks, len(ids), self._token_bytes), states.shape
        self._units.append((as_ids(ids), states))
        self._num_bytes += states.nbytes
        if len(self._units) >= self._most_units or self._num_bytes >= self._most_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered. Raises what `add` raises; then nothing of it is in the store."""
        if not self._units:
            return
        keys = np.frombuffer(b"".join(unit_key(ids) for ids, _ in self._units), np.uint8)
        tensors: dict[str, NDArray[Any]] = {
            "keys": keys.reshape(-1, KEY_BYTES),
            "lengths": np.array([len(ids) for ids, _ in self._units], np.int64),
            "ids": np.concatenate([ids for ids, _ in self._units]),
            "states": np.concatenate([states.reshape(-1) for _, states in self._units]),
            "sums": np.concatenate([sums_of(states).reshape(-1) for _, states in self._units]),
        }
        header = {"format": FORMAT, "version": str(VERSION), "store": self._digest}
        name = hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()
        path = segment_path(self._store, name)
        with writing("--store", self._store):
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{name}.{os.uname().nodename}.{os.getpid()}")
            try:
                save_file(tensors, unfinished, header)
                _sync(unfinished)
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
            _sync(path.parent)
        self._units, self._num_bytes = [], 0


def sums_of(states: Bytes) -> NDArray[np.uint64]:
    """Return the sums of a unit's packed states [T, S, P], or of one block's [S, P]: [..., ceil(S / 64)]."""
    if states.ndim == 3:
        return np.stack([sums_of(block) for block in states])
    sums = [
        xxhash.xxh3_64_intdigest(np.ascontiguousarray(states[first : first + SUM_TOKENS]))
        for first in range(0, len(states), SUM_TOKENS)
    ]
    return np.array(sums, np.uint64)


def segment_path(store: Path, name: str) -> Path:
    """Return the place of the segment `name`, 32 hexadecimal digits."""
    return store / SEGMENTS / name[:2] / f"{name}{SUFFIX}"


def segment_names(store: Path) -> Iterator[str]:
    """Yield the names of the segments that are there. A file that a producer still writes is none."""
    with contextlib.suppress(FileNotFoundError), os.scandir(store / SEGMENTS) as folders:
        for folder in folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as files:
                for file in files:
                    if file.name.endswith(SUFFIX) and not file.name.startswith("."):
                        yield file.name.removesuffix(SUFFIX)


def sweep(store: Path) -> int:
    """Remove what producers left that were killed more than a day ago; return how many files that were."""
    count = 0
    for path in (store / SEGMENTS).glob("*/.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
                count += 1
    return count


def read_layout(path: Path, digest: str) -> Layout:
    """Read a segment's header.

    Raises:
        ValueError: the file is cut off, damaged, no segment, of another version or of another store.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 0 < length <= _LONGEST_HEADER else b""
    try:
        entries = json.loads(header)
        about = entries.pop("__metadata__")
        if about["format"] != FORMAT:
            raise KeyError("format")
        places = {}
        for name, dtype in _DTYPES.items():
            first, last = entries[name]["data_offsets"]
            if entries[name]["dtype"] != dtype or not 0 <= first <= last:
                raise KeyError(name)
            places[name] = (8 + length + first, last - first)
        version, store = about["version"], about["store"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: is no segment of a store of features, or its header is damaged; run {REPAIR}"
        ) from error
    if version != str(VERSION):
        raise ValueError(f"{path}: has the format version {version}, not {VERSION}; run {REPAIR}")
    if store != digest:
        raise ValueError(
            f"{path}: is of the store {store}, not of this one ({digest}); remove it from the folder"
        )
    if max(first + count for first, count in places.values()) != size:
        raise ValueError(
            f"{path}: has {size} bytes, which is not what its header says: cut off; run {REPAIR}"
        )
    return Layout(size, **places)


def _sync(path: Path) -> None:
    """Wait until a file's, or a folder's, content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
