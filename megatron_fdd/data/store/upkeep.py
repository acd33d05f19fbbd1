"""The upkeep of a store: what is in it, whether its bytes are right, and the removal of what nobody needs."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from megatron_fdd.data.store.identity import RUNS, StoreIdentity, read_identity
from megatron_fdd.data.store.index import all_records, repeats
from megatron_fdd.data.store.lens import LENS_FILE, read_stored_extras, read_stored_head, read_stored_norm
from megatron_fdd.data.store.segment import (
    REPAIR,
    SUM_TOKENS,
    ForeignError,
    Layout,
    UnreadableError,
    name_of,
    read_layout,
    segment_entries,
    segment_names,
    segment_path,
    sums_of,
    unreadable,
)
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.unit import KEY_BYTES, unit_key
from megatron_fdd.data.store.whole_file import sweep
from megatron_fdd.data.tokenizer_identity import TOKENIZER_FOLDER, check_copy
from megatron_fdd.host.disk import sized
from megatron_fdd.host.lock import TakenError, lock

_FLAG = "store"
LOCK_FILE = "prune.lock"
_DAY_S = 24 * 3600.0


@dataclass(slots=True)
class Checked:
    """The result of a check: segments that are damaged, were not read, or are of others, each with what is wrong.

    Attributes:
        beside: what is wrong beside the segments, with lens or tokenizer, or None.
    """

    num_segments: int = 0
    num_units: int = 0
    num_bytes: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    beside: str | None = None


def check_store(path: Path, on_segment: Callable[[], object] = lambda: None) -> Checked:
    """Read every byte of a store, and compare it with its sums. Nothing is changed.

    Raises:
        ValueError: there is no store.
    """
    identity, result = read_identity(path, _FLAG), Checked()
    result.beside = _check_beside(path, identity)
    for name, is_file in sorted(segment_entries(path)):
        file = segment_path(path, name)
        result.num_segments += 1
        try:
            result.num_units += _check_segment(file, identity)
            result.num_bytes += file.stat().st_size
        except (UnreadableError, OSError) as error:
            if not os.path.lexists(file):
                continue  # removed meanwhile
            found = result.unread if file.is_file() or file.is_symlink() else result.damaged
            found[name] = str(unreadable(file, error) if isinstance(error, OSError) else error)
        except ForeignError as error:
            result.foreign[name] = str(error)
        except ValueError as error:
            (result.damaged if is_file else result.unread)[name] = str(error)
        on_segment()
    return result


def _check_beside(path: Path, identity: StoreIdentity) -> str | None:
    """Say what is wrong with a store's lens or tokenizer; None if they are sound."""
    if not (path / LENS_FILE).exists():
        return f"{path}: has no lens; run fdd teach again, which writes it"
    try:
        read_stored_norm(path)
        read_stored_head(path, 0, identity.vocab_size)
        check_copy(path / TOKENIZER_FOLDER)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def remove_damaged(path: Path, checked: Checked) -> None:
    """Remove the segments that a check found damaged; `fdd teach` makes their units anew.

    Raises:
        ValueError: the index cannot be written.
    """
    for name in checked.damaged:
        segment_path(path, name).unlink(missing_ok=True)
    if not checked.foreign:  # with them it does not open, and the check has named them
        Store.open(path, _FLAG).save_index()


def prune(path: Path, *, older_than_days: float | None = None) -> tuple[int, int]:
    """Remove what killed producers left, segments whose units are all in other ones, and old ones if asked to.

    Args:
        older_than_days: segments, and counts of runs, that were written longer ago are removed.

    Returns:
        How many files were removed, and their bytes.

    Raises:
        ValueError: there is no store, a segment is damaged, another prune is at work, or the index cannot be written.
    """
    identity = read_identity(path, _FLAG)
    try:
        # Two of them could keep different copies of a unit, and each remove the other's.
        with lock(path / LOCK_FILE):
            return _prune(path, identity, older_than_days)
    except TakenError as error:
        raise ValueError(
            f"{path}: another fdd store prune is at work there ({error}); run this again when it has ended"
        ) from error


def _prune(path: Path, identity: StoreIdentity, older_than_days: float | None) -> tuple[int, int]:
    names = sorted(segment_names(path))
    units, counts = _units_by_segment(path, identity, names)
    for name in names:  # the copy that stays must be the right one
        if bool((counts[units[name]] > 1).any()):
            _check_segment(segment_path(path, name), identity)
    before_s = -math.inf if older_than_days is None else time.time() - older_than_days * _DAY_S
    old = _older(path, names, before_s)
    count, num_bytes = sweep(path), 0
    for run in (path / RUNS).glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            if run.stat().st_mtime < before_s:
                num_bytes += run.stat().st_size
                run.unlink()
                count += 1
    # Old ones first. Then the last by name: an index names the first segment of a unit.
    for name in sorted(names, key=lambda name: (name in old, name), reverse=True):
        if name in old or bool((counts[units[name]] > 1).all()):
            counts[units[name]] -= 1
            file = segment_path(path, name)
            with contextlib.suppress(FileNotFoundError):  # a check has removed it
                num_bytes += file.stat().st_size
                file.unlink()
                count += 1
    Store.open(path, _FLAG).save_index()
    return count, num_bytes


def describe(store: Store) -> Iterator[str]:
    """Yield lines about a store, for people."""
    identity, index = store.identity, store.index
    teacher = identity.teacher if identity.teacher.isprintable() else repr(identity.teacher)
    yield f"{store.path}: features of {teacher}, made by the engine {identity.engine}"
    ran = ", ".join(f"{name} {value}" for name, value in identity.ran.items())
    yield f"  it ran with: {ran}"
    yield f"  teacher: {identity.num_layers} blocks of width {identity.hidden_size}, {identity.vocab_size} tokens"
    yield (
        f"  stored: blocks {', '.join(map(str, identity.blocks))} before the final norm, {identity.form}, "
        f"{identity.token_bytes} bytes each, {identity.token_bytes * len(identity.blocks)} a token"
    )
    yield f"  lens: {_lens(store.path)}"
    size = int(index.layouts[:, 0].sum())
    yield f"  {len(index)} units, {index.num_tokens} tokens, in {len(index.names)} segment(s) of {sized(size)}"
    lengths = index.records["length"]
    if len(lengths):
        quantiles = np.quantile(lengths, (0.0, 0.5, 1.0)).astype(int)
        yield f"  tokens of a unit: {quantiles[0]} to {quantiles[2]}, half of them at most {quantiles[1]}"


def _lens(path: Path) -> str:
    """Say what a store's lens is."""
    if not (path / LENS_FILE).is_file():
        return "missing; run fdd teach again"
    norm, extras = read_stored_norm(path), read_stored_extras(path)
    words = [{"rms": "RMSNorm", "layer": "LayerNorm"}[norm.kind], "head"]
    words += ["its bias"] if extras.bias_V is not None else []
    words += [f"a soft cap of {extras.cap:g} over the logits"] if extras.cap is not None else []
    return ", ".join(words)


def _units_by_segment(
    path: Path, identity: StoreIdentity, names: Sequence[str]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """Return for each segment the numbers of its units, each once; and in how many segments each unit is."""
    records = all_records(path, identity.digest, len(identity.blocks), names)
    numbers = np.cumsum(~repeats(records)) - 1
    units = {name: np.unique(numbers[records["segment"] == place]) for place, name in enumerate(names)}
    counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *units.values()]))
    return units, counts


def _older(path: Path, names: Sequence[str], before_s: float) -> set[str]:
    """Return the segments that were written before a time."""
    found = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if segment_path(path, name).stat().st_mtime < before_s:
                found.add(name)
    return found


def _check_segment(path: Path, identity: StoreIdentity) -> int:
    """Compare all bytes of a segment with its keys and sums; return how many units it has.

    Raises:
        ValueError: says what is wrong.
    """
    layout = read_layout(path, identity.digest)
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: is no sound safetensors file ({error}); run {REPAIR}") from error
    num_blocks, width = len(identity.blocks), identity.token_bytes
    with path.open("rb") as file:

        def read(place: tuple[int, int]) -> bytes:
            file.seek(place[0])
            return file.read(place[1])

        keys, lengths = read(layout.keys), np.frombuffer(read(layout.lengths), "<i8")
        ids, sums = np.frombuffer(read(layout.ids), "<i4"), np.frombuffer(read(layout.sums), "<u8")
        _check_sizes(path, layout, lengths, num_blocks, width)
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
    if (name := name_of(keys)) != path.stem:
        raise ForeignError(
            f"{path}: is sound, but has the name of another segment: rename it to {segment_path(path.parents[2], name)}"
        )
    return len(lengths)


def _check_sizes(
    path: Path, layout: Layout, lengths: NDArray[np.int64], num_blocks: int, token_bytes: int
) -> None:
    """Refuse tensors of a segment that do not fit each other."""
    num_tokens = int(lengths.sum()) if len(lengths) and lengths.min() > 0 else -1
    num_sums = num_blocks * int((-(-lengths // SUM_TOKENS)).sum())
    if (
        layout.keys[1] != len(lengths) * KEY_BYTES
        or layout.ids[1] != num_tokens * 4
        or layout.states[1] != num_tokens * num_blocks * token_bytes
        or layout.sums[1] != num_sums * 8
    ):
        raise ValueError(
            f"{path}: its keys, lengths, ids, states and sums do not fit each other; run {REPAIR}"
        )
