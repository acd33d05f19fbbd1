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
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_fdd.data.store.identity import FORMAT, VERSION
from megatron_fdd.data.store.unit import KEY_BYTES, as_ids, unit_key
from megatron_fdd.data.store.whole_file import FileTensor, write_tensors

Bytes = NDArray[np.uint8]

SUFFIX = ".safetensors"
SEGMENTS = "segments"
# The remedy of damage.
REPAIR = "fdd store check STORE --remove-damaged, and then fdd teach, which makes it anew"
# How many tokens one sum covers.
SUM_TOKENS = 64
_DTYPES = {"keys": "U8", "lengths": "I64", "ids": "I32", "states": "U8", "sums": "U64"}
# No header of ours is longer.
_LONGEST_HEADER = 1 << 16
_NAME = re.compile(r"[0-9a-f]{32}")


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
        name = name_of(b"".join(unit_key(ids) for ids, _ in self._units))
        write_segment(self._store, segment_path(self._store, name), self._digest, self._units)
        self._units, self._num_bytes = [], 0


def write_segment(
    store: Path, path: Path, digest: str, units: Sequence[tuple[NDArray[np.int32], Bytes]]
) -> None:
    """Write units, each with its ids [S] and packed hidden states [T, S, P], as one segment at `path`.

    Raises:
        ValueError: the disk cannot take the file; then it is not there.
    """
    keys = np.frombuffer(b"".join(unit_key(ids) for ids, _ in units), np.uint8)
    lengths = np.array([len(ids) for ids, _ in units], np.int64)
    states = [np.ascontiguousarray(states) for _, states in units]
    sums = [sums_of(each) for each in states]
    tensors = {
        "keys": FileTensor("U8", (len(units), KEY_BYTES), [keys]),
        "lengths": FileTensor("I64", (len(units),), [lengths]),
        "ids": FileTensor("I32", (int(lengths.sum()),), [as_ids(ids) for ids, _ in units]),
        "states": FileTensor("U8", (sum(each.size for each in states),), states),
        "sums": FileTensor("U64", (sum(each.size for each in sums),), sums),
    }
    write_tensors(store, path, tensors, _about(digest))


def sums_of(states: Bytes) -> NDArray[np.uint64]:
    """Return the sums of a unit's packed states [T, S, P], or of one block's [S, P]: [..., ceil(S / 64)]."""
    if states.ndim == 3:
        return np.stack([sums_of(block) for block in states])
    sums = [
        xxhash.xxh3_64_intdigest(np.ascontiguousarray(states[first : first + SUM_TOKENS]))
        for first in range(0, len(states), SUM_TOKENS)
    ]
    return np.array(sums, np.uint64)


def segment_bytes(lengths: NDArray[np.int64], num_blocks: int, token_bytes: int) -> int:
    """Return what units of these lengths take in segments, without the headers."""
    num_sums = num_blocks * int((-(-lengths // SUM_TOKENS)).sum())
    return int(lengths.sum()) * (4 + num_blocks * token_bytes) + 8 * num_sums + (KEY_BYTES + 8) * len(lengths)


def _about(digest: str) -> dict[str, str]:
    return {"format": FORMAT, "version": str(VERSION), "store": digest}


def start_of(digest: str) -> bytes:
    """Return the beginning of the header of a store's segments, behind its length."""
    return f'{{"__metadata__":{json.dumps(_about(digest), separators=(",", ":"))}'.encode()


def name_of(keys: bytes) -> str:
    """Return the name of the segment with these units."""
    return hashlib.blake2b(keys, digest_size=16).hexdigest()


def segment_path(store: Path, name: str) -> Path:
    """Return the place of the segment `name`, 32 hexadecimal digits."""
    return store / SEGMENTS / name[:2] / f"{name}{SUFFIX}"


def segment_names(store: Path) -> Iterator[str]:
    """Yield the names of the segments that are there; no other files, and none that a producer still writes."""
    return (name for name, is_file in segment_entries(store) if is_file)


def segment_entries(store: Path) -> Iterator[tuple[str, bool]]:
    """Yield the names of all that is named as a segment, and whether it is a regular file."""
    with contextlib.suppress(FileNotFoundError), os.scandir(store / SEGMENTS) as folders:
        for folder in folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as files:
                for file in files:
                    name = file.name.removesuffix(SUFFIX)
                    if file.name.endswith(SUFFIX) and _NAME.fullmatch(name) and name[:2] == folder.name:
                        yield name, file.is_file()


def read_layout(path: Path, digest: str) -> Layout:
    """Read a segment's header.

    Raises:
        ForeignError: it is of another version or of another store.
        ValueError: the file is gone, no regular file, cut off, damaged, or no segment.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: is no regular file; remove it, and run fdd teach, which makes it anew")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if 0 < length <= _LONGEST_HEADER else b""
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        entries = json.loads(header)
        about = entries.pop("__metadata__")
        if about["format"] != FORMAT:
            raise KeyError("format")
        places = {}
        for name, dtype in _DTYPES.items():
            first, last = entries[name]["data_offsets"]
            if entries[name]["dtype"] != dtype or not (
                type(first) is type(last) is int and 0 <= first <= last
            ):
                raise KeyError(name)
            places[name] = (8 + length + first, last - first)
        version, store = about["version"], about["store"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: is no segment of a store of features, or its header is damaged; run {REPAIR}"
        ) from error
    if version != str(VERSION):
        raise ForeignError(
            f"{path}: has the format version {version}, not {VERSION}; read it with the version that wrote it, or move "
            "it out of the folder and run fdd teach, which makes it anew"
        )
    if store != digest:
        raise ForeignError(
            f"{path}: is of the store {store}, not of this one ({digest}); move it out of the folder, and run fdd "
            "teach again, which makes what is missing; if all segments are, store.json has changed: copy that again"
        )
    if max(first + count for first, count in places.values()) != size:
        raise ValueError(
            f"{path}: has {size} bytes, which is not what its header says: cut off; run {REPAIR}"
        )
    return Layout(size, **places)


class ForeignError(ValueError):
    """A segment of another store or version: it may be sound, and nobody here can make it anew."""


class UnreadableError(ValueError):
    """A segment that the system does not give: it may be sound."""


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """Return what is said about a segment that the system does not give."""
    if isinstance(error, FileNotFoundError):
        return UnreadableError(
            f"{path}: is gone; was the store pruned while it was read? Run fdd teach again, which makes what is missing"
        )
    return UnreadableError(
        f"{path}: cannot be read ({error.strerror}); where it is damaged, run {REPAIR}; else see what your system says"
    )
