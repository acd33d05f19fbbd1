"""The upkeep of a store: what is in it, whether its bytes are right, and the removal of what nobody needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_fdd.data.store.identity import StoreIdentity, read_identity
from megatron_fdd.data.store.lens import LENS_FILE, read_stored_head, read_stored_norm
from megatron_fdd.data.store.segment import (
    REPAIR,
    Layout,
    read_layout,
    segment_names,
    segment_path,
    sums_of,
    sweep,
)
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.unit import KEY_BYTES, unit_key

_FLAG = "store"
_DAY_S = 24 * 3600.0


@dataclass(slots=True)
class Checked:
    """The result of a check: the damaged segments, and what is wrong with each."""

    num_segments: int = 0
    num_units: int = 0
    num_bytes: int = 0
    damaged: dict[str, str] = field(default_factory=dict)


def check_store(path: Path, on_segment: Callable[[], object] = lambda: None) -> Checked:
    """Read every byte of a store, and compare it with its sums. Nothing is changed.

    Raises:
        ValueError: there is no store, or its lens is damaged.
    """
    identity, result = read_identity(path, _FLAG), Checked()
    if (path / LENS_FILE).is_file():
        read_stored_norm(path)
        read_stored_head(path, 0, identity.vocab_size)
    for name in sorted(segment_names(path)):
        file = segment_path(path, name)
        result.num_segments += 1
        try:
            result.num_units += _check_segment(file, identity)
            result.num_bytes += file.stat().st_size
        except ValueError as error:
            result.damaged[name] = str(error)
        on_segment()
    return result


def remove_damaged(path: Path, checked: Checked) -> None:
    """Remove the segments that a check found damaged; `fdd teach` makes their units anew.

    Raises:
        ValueError: the index cannot be written.
    """
    for name in checked.damaged:
        segment_path(path, name).unlink(missing_ok=True)
    Store.open(path, _FLAG).save_index()


def prune(path: Path, *, older_than_days: float | None = None) -> tuple[int, int]:
    """Remove what killed producers left, segments whose units are all in other ones, and old ones if asked to.

    Args:
        older_than_days: segments that were written longer ago are removed.

    Returns:
        How many files were removed, and their bytes.

    Raises:
        ValueError: there is no store, a segment is damaged, or the index cannot be written.
    """
    store = Store.open(path, _FLAG)
    before = time.time() - (older_than_days or 0.0) * _DAY_S
    used = np.bincount(store.index.records["segment"], minlength=len(store.index.names))
    count, num_bytes = sweep(path), 0
    for number, name in enumerate(store.index.names):
        file = segment_path(path, name)
        is_old = older_than_days is not None and file.stat().st_mtime < before
        if used[number] == 0 or is_old:
            num_bytes += file.stat().st_size
            count += 1
            file.unlink()
    Store.open(path, _FLAG).save_index()
    return count, num_bytes


def describe(store: Store) -> Iterator[str]:
    """Yield lines about a store, for people."""
    identity, index = store.identity, store.index
    yield f"{store.path}: features of {identity.teacher}, made by the engine {identity.engine}"
    ran = ", ".join(f"{name} {value}" for name, value in identity.ran.items())
    yield f"  it ran with: {ran}"
    yield f"  teacher: {identity.num_layers} blocks of width {identity.hidden_size}, {identity.vocab_size} tokens"
    yield (
        f"  stored: blocks {', '.join(map(str, identity.blocks))} before the final norm, {identity.form}, "
        f"{identity.token_bytes} bytes each, {identity.token_bytes * len(identity.blocks)} a token"
    )
    has_lens = (store.path / LENS_FILE).is_file()
    yield f"  lens: {'there' if has_lens else 'missing; run fdd teach again'}"
    size = int(index.layouts[:, 0].sum())
    yield f"  {len(index)} units, {index.num_tokens} tokens, in {len(index.names)} segments of {size / 1e9:.3f} GB"
    lengths = index.records["length"]
    if len(lengths):
        quantiles = np.quantile(lengths, (0.0, 0.5, 1.0)).astype(int)
        yield f"  tokens of a unit: {quantiles[0]} to {quantiles[2]}, half of them at most {quantiles[1]}"


def _check_segment(path: Path, identity: StoreIdentity) -> int:
    """Compare all bytes of a segment with its keys and sums; return how many units it has.

    Raises:
        ValueError: says what is wrong.
    """
    layout = read_layout(path, identity.digest)
    num_blocks, width = len(identity.blocks), identity.token_bytes
    with path.open("rb") as file:

        def read(place: tuple[int, int]) -> bytes:
            file.seek(place[0])
            return file.read(place[1])

        keys, lengths = read(layout.keys), np.frombuffer(read(layout.lengths), "<i8")
        ids, sums = np.frombuffer(read(layout.ids), "<i4"), np.frombuffer(read(layout.sums), "<u8")
        _check_sizes(path, layout, keys, lengths, num_blocks * width)
        first = at = 0
        for number, length in enumerate(lengths.tolist()):
            unit = ids[first : first + length]
            if unit_key(unit) != keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]:
                raise ValueError(f"{path}: unit {number} has other ids than its key says; run {REPAIR}")
            size = num_blocks * length * width
            states = read((layout.states[0] + first * num_blocks * width, size))
            found = sums_of(np.frombuffer(states, np.uint8).reshape(num_blocks, length, width)).reshape(-1)
            if not np.array_equal(found, sums[at : at + len(found)]):
                raise ValueError(
                    f"{path}: unit {number} has other hidden states than were written; run {REPAIR}"
                )
            first, at = first + length, at + len(found)
    return len(lengths)


def _check_sizes(
    path: Path, layout: Layout, keys: bytes, lengths: NDArray[np.int64], token_bytes: int
) -> None:
    """Refuse tensors of a segment that do not fit each other."""
    num_tokens = int(lengths.sum()) if len(lengths) and lengths.min() > 0 else -1
    if (
        len(keys) != len(lengths) * KEY_BYTES
        or num_tokens * 4 != layout.ids[1]
        or num_tokens * token_bytes != layout.states[1]
        or layout.sums[1] % 8
    ):
        raise ValueError(f"{path}: its keys, lengths, ids and states do not fit each other; run {REPAIR}")
