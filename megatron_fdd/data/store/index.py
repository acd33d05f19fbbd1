"""The index of a store: where each unit lies. A cache of the segments' own keys, in one file that is mapped."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from megatron_fdd.data.store.segment import (
    REPAIR,
    SUM_TOKENS,
    Layout,
    name_of,
    read_layout,
    segment_names,
    segment_path,
    unreadable,
)
from megatron_fdd.data.store.unit import KEY_BYTES
from megatron_fdd.data.store.whole_file import FileTensor, write_tensors

INDEX_FILE = "index.safetensors"
# A unit: its key as two numbers, its segment, its tokens, the tokens of the segment before it, and the sums before it.
_RECORD = np.dtype(
    [
        ("high", "<u8"),
        ("low", "<u8"),
        ("segment", "<u4"),
        ("length", "<u4"),
        ("start", "<u4"),
        ("sums", "<u4"),
    ]
)
_FIELDS = struct.Struct("<QQIIII")
_LAYOUT_NAMES = ("size", "ids", "states", "sums", "units")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a unit lies.

    Attributes:
        segment: number of the segment.
        length: tokens of the unit, S.
        start: tokens of the segment before it.
        sums: sums of the segment before it.
    """

    segment: int
    length: int
    start: int
    sums: int


class Index:
    """The places of all units of a store.

    Args:
        names: of the segments, by number.
        layouts: int64 [segments, 5]: size of the file, the first bytes of ids, states and sums, number of units.
        records: sorted by key, one for each key.
    """

    def __init__(self, names: Sequence[str], layouts: NDArray[np.int64], records: NDArray[np.void]) -> None:
        self.names = list(names)
        self.layouts = layouts
        self.records = records
        # Apart from the records, so that a look-up touches few pages.
        self._high = np.ascontiguousarray(records["high"])
        self._bytes = memoryview(records.view(np.uint8)) if len(records) else memoryview(b"")

    def __len__(self) -> int:
        return len(self.records)

    @property
    def digest(self) -> str:
        """A hash of the segments' names: two processes with the same one see the same store."""
        return xxhash.xxh3_64_hexdigest("".join(self.names).encode())

    @property
    def num_tokens(self) -> int:
        """Tokens of all units."""
        return int(self.records["length"].sum(dtype=np.int64))

    def find(self, key: bytes) -> Place | None:
        """Return where a unit lies; None if the store lacks it."""
        return self.find_all([key])[0]

    def find_all(self, keys: Sequence[bytes]) -> list[Place | None]:
        """Return for each of some keys what `find` returns."""
        wanted = np.frombuffer(b"".join(keys), ">u8").astype(np.uint64).reshape(-1, 2)
        first = self._high.searchsorted(wanted[:, 0]).tolist()
        return [self._place(at, *key) for at, key in zip(first, wanted.tolist(), strict=True)]

    def _place(self, first: int, wanted_high: int, wanted_low: int) -> Place | None:
        """Return the place of a key, whose record is at `first` or behind it."""
        for at in range(first, len(self._high)):
            high, low, *place = _FIELDS.unpack_from(self._bytes, at * _RECORD.itemsize)
            if high != wanted_high:
                break
            if low == wanted_low:
                return Place(*place)
        return None

    def has(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Return for each of many keys whether the store has it; an entry may hold several, one behind the other."""
        together = b"".join(keys)
        wanted = np.frombuffer(together, ">u8").reshape(-1, 2).astype(np.uint64)
        first = np.searchsorted(self._high, wanted[:, 0])
        found = np.zeros(len(wanted), np.bool_)
        inside = np.flatnonzero(first < len(self))
        hits = self.records[first[inside]]
        is_near = hits["high"] == wanted[inside, 0]
        found[inside] = is_near & (hits["low"] == wanted[inside, 1])
        # Two keys with the same first half: once in 10**19 pairs.
        for miss in inside[is_near & ~found[inside]].tolist():
            found[miss] = self.find(together[KEY_BYTES * miss : KEY_BYTES * (miss + 1)]) is not None
        return found


def open_index(store: Path, digest: str, num_blocks: int) -> Index:
    """Return the index of a store, from its cache as far as that is right; other segments' headers are read.

    Args:
        digest: of the store's identity.
        num_blocks: T, blocks of a unit.

    Raises:
        ValueError: a segment is damaged, cut off or foreign.
    """
    present = sorted(segment_names(store))
    cached = _read_cache(store, digest)
    if cached is not None and cached.names == present:
        return cached
    layouts = np.zeros((len(present), len(_LAYOUT_NAMES)), np.int64)
    known = {} if cached is None else _reusable(cached, set(present))
    renumbered = np.full(0 if cached is None else len(cached.names), -1, np.int64)
    parts = [np.zeros(0, _RECORD)]
    for number, name in enumerate(present):
        if name in known and cached is not None:
            layouts[number] = cached.layouts[known[name]]
            renumbered[known[name]] = number
            continue
        layout = read_layout(segment_path(store, name), digest)
        parts.append(_records_of(segment_path(store, name), layout, number, num_blocks))
        layouts[number] = layout.size, layout.ids[0], layout.states[0], layout.sums[0], len(parts[-1])
    if cached is not None:
        kept = cached.records[renumbered[cached.records["segment"]] >= 0].copy()
        kept["segment"] = renumbered[kept["segment"]]
        parts.append(kept)
    records = np.concatenate(parts)
    records = records[np.lexsort((records["segment"], records["low"], records["high"]))]
    return Index(present, layouts, records[~repeats(records)])


def index_of(path: Path, digest: str, num_blocks: int) -> Index:
    """Return the index of one segment, wherever it lies.

    Raises:
        ValueError: it is gone, damaged, cut off or foreign.
    """
    layout = read_layout(path, digest)
    records = _records_of(path, layout, 0, num_blocks)
    row = layout.size, layout.ids[0], layout.states[0], layout.sums[0], len(records)
    order = np.lexsort((records["low"], records["high"]))
    return Index([path.stem], np.array([row], np.int64), records[order])


def repeats(records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Return which sorted records have the key of the one before: units that two producers wrote.

    All are right, and the first segment counts.
    """
    repeated = np.zeros(len(records), np.bool_)
    repeated[1:] = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    return repeated


def all_records(store: Path, digest: str, num_blocks: int, names: Sequence[str]) -> NDArray[np.void]:
    """Read the records of some segments, sorted by key; a unit that is in several has several.

    Raises:
        ValueError: a segment is damaged, cut off or foreign.
    """
    parts = [np.zeros(0, _RECORD)]
    for number, name in enumerate(names):
        path = segment_path(store, name)
        parts.append(_records_of(path, read_layout(path, digest), number, num_blocks))
    records = np.concatenate(parts)
    return records[np.lexsort((records["segment"], records["low"], records["high"]))]


def write_index(store: Path, digest: str, index: Index) -> None:
    """Write the cache, whole or not at all.

    Raises:
        ValueError: the disk cannot take the file.
    """
    names = np.frombuffer(b"".join(bytes.fromhex(name) for name in index.names), np.uint8)
    records = np.ascontiguousarray(index.records).view(np.uint8)
    tensors = {
        "names": FileTensor("U8", (len(index.names), KEY_BYTES), [names]),
        "layouts": FileTensor("I64", index.layouts.shape, [np.ascontiguousarray(index.layouts)]),
        "records": FileTensor("U8", records.shape, [records]),
    }
    about = {"store": digest, "sum": _sum_of(index.names, index.layouts, index.records)}
    write_tensors(store, store / INDEX_FILE, tensors, about)


def _reusable(cached: Index, present: set[str]) -> dict[str, int]:
    """Return the numbers of the cached segments that need not be read again.

    When segments went, those are read again whose units were said to lie in others, which may be the ones that went.
    """
    names = {name: number for number, name in enumerate(cached.names) if name in present}
    if len(names) == len(cached.names):
        return names
    counts = np.bincount(cached.records["segment"], minlength=len(cached.names))
    is_whole = counts == cached.layouts[:, _LAYOUT_NAMES.index("units")]
    return {name: number for name, number in names.items() if is_whole[number]}


def _read_cache(store: Path, digest: str) -> Index | None:
    """Return what the cache says; None if there is none that can be used.

    It is read, not mapped: another machine may replace it meanwhile.
    """
    path = store / INDEX_FILE
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            if about.get("store") != digest:
                return None
            joined = file.get_tensor("names").tobytes().hex()
            names = [joined[first : first + 32] for first in range(0, len(joined), 2 * KEY_BYTES)]
            layouts = file.get_tensor("layouts")
            num_records = file.get_slice("records").get_shape()[0] // _RECORD.itemsize
        if layouts.shape != (len(names), len(_LAYOUT_NAMES)):
            return None
        with path.open("rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
            (first, _) = json.loads(raw.read(header))["records"]["data_offsets"]
        records = np.fromfile(path, _RECORD, num_records, offset=8 + header + first)
        if about.get("sum") != _sum_of(names, layouts, records):
            return None
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    return Index(names, layouts, records)


def _sum_of(names: Sequence[str], layouts: NDArray[np.int64], records: NDArray[np.void]) -> str:
    total = xxhash.xxh3_64("".join(names).encode())
    total.update(np.ascontiguousarray(layouts))
    total.update(records)
    return total.hexdigest()


def _records_of(path: Path, layout: Layout, number: int, num_blocks: int) -> NDArray[np.void]:
    """Read keys and lengths of a segment.

    Raises:
        ValueError: the file is gone, its keys are not those of its name, or they do not fit each other.
    """
    if layout.keys[1] % KEY_BYTES or layout.lengths[1] % 8:
        raise ValueError(f"{path}: its header is damaged; run {REPAIR}")
    try:
        with path.open("rb") as file:
            file.seek(layout.keys[0])
            names = file.read(layout.keys[1])
            file.seek(layout.lengths[0])
            lengths = np.frombuffer(file.read(layout.lengths[1]), "<i8")
    except OSError as error:
        raise unreadable(path, error) from error
    if name_of(names) != path.stem:
        raise ValueError(f"{path}: has other keys than its name says; run {REPAIR}")
    keys = np.frombuffer(names, ">u8").reshape(-1, 2)
    blocks = -(-lengths // SUM_TOKENS) * num_blocks
    num_tokens = layout.ids[1] // 4
    if len(keys) != len(lengths) or lengths.sum() != num_tokens or blocks.sum() * 8 != layout.sums[1]:
        raise ValueError(f"{path}: its keys, lengths and sums do not fit each other; run {REPAIR}")
    records = np.zeros(len(keys), _RECORD)
    records["high"], records["low"] = keys[:, 0], keys[:, 1]
    records["segment"], records["length"] = number, lengths
    records["start"], records["sums"] = np.cumsum(lengths) - lengths, np.cumsum(blocks) - blocks
    return records
