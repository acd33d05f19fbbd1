"""The index of a store: where each unit lies. A cache of the segments' own keys, in one file that is mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_fdd.data.store.segment import (
    REPAIR,
    SUM_TOKENS,
    Layout,
    read_layout,
    segment_names,
    segment_path,
)
from megatron_fdd.data.store.unit import KEY_BYTES
from megatron_fdd.host.disk import writing

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
_LAYOUT_NAMES = ("size", "ids", "states", "sums")


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
        layouts: int64 [segments, 4]: size of the file, and the first bytes of ids, states and sums.
        records: sorted by key, one for each key.
    """

    def __init__(self, names: Sequence[str], layouts: NDArray[np.int64], records: NDArray[np.void]) -> None:
        self.names = list(names)
        self.layouts = layouts
        self.records = records
        # Apart from the records, so that a look-up touches few pages.
        self._high = np.ascontiguousarray(records["high"])

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_tokens(self) -> int:
        """Tokens of all units."""
        return int(self.records["length"].sum(dtype=np.int64))

    def find(self, key: bytes) -> Place | None:
        """Return where a unit lies; None if the store lacks it."""
        high = int.from_bytes(key[:8], "big")
        at = int(np.searchsorted(self._high, np.uint64(high)))
        low = int.from_bytes(key[8:], "big")
        while at < len(self._high) and self._high[at] == high:
            record = self.records[at]
            if int(record["low"]) == low:
                return Place(*(int(record[name]) for name in ("segment", "length", "start", "sums")))
            at += 1
        return None

    def has(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Return for each of many keys whether the store has it."""
        wanted = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2)
        first = np.searchsorted(self._high, wanted[:, 0].astype(np.uint64))
        found = np.zeros(len(wanted), np.bool_)
        inside = first < len(self)
        hits = self.records[first[inside]]
        found[inside] = (hits["high"] == wanted[inside, 0]) & (hits["low"] == wanted[inside, 1])
        # Two keys with the same first half: once in 10**19 pairs.
        for miss in np.flatnonzero(inside & ~found).tolist():
            found[miss] = self.find(keys[miss]) is not None
        return found


def open_index(store: Path, digest: str, num_blocks: int, *, skip: Iterable[str] = ()) -> Index:
    """Return the index of a store, from its cache as far as that is right; other segments' headers are read.

    Args:
        digest: of the store's identity.
        num_blocks: T, blocks of a unit.
        skip: names of segments to leave out.

    Raises:
        ValueError: a segment is damaged, cut off or foreign.
    """
    present = sorted(set(segment_names(store)) - set(skip))
    cached = _read_cache(store, digest)
    known = {} if cached is None else {name: number for number, name in enumerate(cached.names)}
    if cached is not None and cached.names == present:
        return cached
    layouts = np.zeros((len(present), len(_LAYOUT_NAMES)), np.int64)
    parts = []
    renumbered = np.full(len(known), -1, np.int64)
    for number, name in enumerate(present):
        if name in known and cached is not None:
            layouts[number] = cached.layouts[known[name]]
            renumbered[known[name]] = number
            continue
        layout = read_layout(segment_path(store, name), digest)
        layouts[number] = layout.size, layout.ids[0], layout.states[0], layout.sums[0]
        parts.append(_records_of(segment_path(store, name), layout, number, num_blocks))
    if cached is not None:
        kept = cached.records[renumbered[cached.records["segment"]] >= 0].copy()
        kept["segment"] = renumbered[kept["segment"]]
        parts.append(kept)
    records = np.concatenate(parts) if parts else np.zeros(0, _RECORD)
    order = np.lexsort((records["segment"], records["low"], records["high"]))
    records = records[order]
    # A unit that two producers wrote: all are right, the first segment counts.
    repeated = np.zeros(len(records), np.bool_)
    repeated[1:] = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    return Index(present, layouts, records[~repeated])


def write_index(store: Path, digest: str, index: Index) -> None:
    """Write the cache, whole or not at all.

    Raises:
        ValueError: the disk cannot take the file.
    """
    names = np.frombuffer(b"".join(bytes.fromhex(name) for name in index.names), np.uint8)
    tensors: dict[str, NDArray[Any]] = {
        "names": names.reshape(-1, KEY_BYTES),
        "layouts": np.ascontiguousarray(index.layouts),
        "records": np.frombuffer(index.records.tobytes(), np.uint8),
    }
    path = store / INDEX_FILE
    unfinished = store / f".{INDEX_FILE}.{os.uname().nodename}.{os.getpid()}"
    with writing("--store", store):
        try:
            save_file(tensors, unfinished, {"store": digest, "sum": _sum_of(tensors["records"])})
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _read_cache(store: Path, digest: str) -> Index | None:
    """Return what the cache says; None if there is none that can be used. Its numbers are mapped, not read."""
    path = store / INDEX_FILE
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            if about.get("store") != digest:
                return None
            names = [row.tobytes().hex() for row in file.get_tensor("names")]
            layouts = file.get_tensor("layouts")
            num_records = file.get_slice("records").get_shape()[0] // _RECORD.itemsize
        if layouts.shape != (len(names), len(_LAYOUT_NAMES)):
            return None
        with path.open("rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
            (first, _) = json.loads(raw.read(header))["records"]["data_offsets"]
        if num_records == 0:
            return Index(names, layouts, np.zeros(0, _RECORD))
        records = np.memmap(path, _RECORD, "r", 8 + header + first, num_records)
        if about.get("sum") != _sum_of(records):
            return None
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    return Index(names, layouts, records)


def _sum_of(records: NDArray[Any]) -> str:
    return xxhash.xxh3_64_hexdigest(records)


def _records_of(path: Path, layout: Layout, number: int, num_blocks: int) -> NDArray[np.void]:
    """Read keys and lengths of a segment.

    Raises:
        ValueError: they do not fit each other.
    """
    with path.open("rb") as file:
        file.seek(layout.keys[0])
        keys = np.frombuffer(file.read(layout.keys[1]), ">u8").reshape(-1, 2)
        file.seek(layout.lengths[0])
        lengths = np.frombuffer(file.read(layout.lengths[1]), "<i8")
    blocks = -(-lengths // SUM_TOKENS) * num_blocks
    num_tokens = layout.ids[1] // 4
    if len(keys) != len(lengths) or lengths.sum() != num_tokens or blocks.sum() * 8 != layout.sums[1]:
        raise ValueError(f"{path}: its keys, lengths and sums do not fit each other; run {REPAIR}")
    records = np.zeros(len(keys), _RECORD)
    records["high"], records["low"] = keys[:, 0], keys[:, 1]
    records["segment"], records["length"] = number, lengths
    records["start"], records["sums"] = np.cumsum(lengths) - lengths, np.cumsum(blocks) - blocks
    return records
