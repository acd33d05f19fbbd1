"""The smallest and the largest token id of a set, and the check that every holder of a vocabulary has them.

A set of `fdd prepare` stores both ids; a sample of its file must lie between them. The file of any other set is read
once, as a whole: each rank looks for itself, and the ranks of a machine share what it has read. If that takes long,
both ids are kept beside Megatron's index of the set, with the size and the time of the file that they were read from.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from megatron_fdd.data.prepared import PREPARE_AGAIN, PreparedSet
from megatron_fdd.data.sources import cache_folder
from megatron_fdd.host import console

# Ids that are looked at together.
_CHUNK = 1 << 24
# The sample of a set whose range is stored: so many ids, in pieces from its first to its last.
_SAMPLED_IDS, _PIECES = 1_000_000, 64
# A read that takes longer is remembered, and says every so often how far it is.
_LONG_S, _SAY_EVERY_S = 1.0, 10.0


@dataclass(frozen=True, slots=True)
class TokenRange:
    """All ids of a set lie between these two, inclusive. A set without ids has the range from 0 to -1."""

    smallest: int
    largest: int


def check_token_ids(
    args: argparse.Namespace, sets: Mapping[str, PreparedSet], holders: Mapping[str, int]
) -> None:
    """Refuse a set with a token id that is negative, or that not every holder of a vocabulary has.

    Args:
        sets: the sets of the run, by prefix (`open_sets`).
        holders: the name of each holder, and the number of its ids.

    Raises:
        ValueError: names the set, the id, the holder and the remedy.
    """
    for prefix, prepared in sets.items():
        found = token_range(prepared, cache_folder(args, prefix))
        if found.smallest < 0:
            raise ValueError(
                f"{prefix} has the token id {found.smallest}, and ids begin with 0: the file is damaged or of "
                f"another type; {PREPARE_AGAIN}"
            )
        for holder, num_ids in holders.items():
            if found.largest >= num_ids:
                raise ValueError(
                    f"{prefix} has the token id {found.largest}, and {holder} has {num_ids} ids (0 to "
                    f"{num_ids - 1}); prepare the data with a tokenizer all of whose ids teacher and student know"
                )


def token_range(prepared: PreparedSet, kept_in: str) -> TokenRange:
    """Return the range of a set's ids.

    Args:
        kept_in: the folder in which a range that took long to read is kept.

    Raises:
        ValueError: a sample of the file contradicts the range that is stored beside it.
    """
    path, info = prepared.prefix + ".bin", prepared.info
    status = os.stat(path)
    if info is None:
        source = _Source(path, prepared.dtype.name, status.st_size, status.st_mtime_ns)
        return _read(source, kept_in)
    stored = TokenRange(info.smallest_token_id, info.largest_token_id)
    sample = _sample(path, prepared.dtype)
    for found in (sample.smallest, sample.largest):
        if sample.smallest <= sample.largest and not stored.smallest <= found <= stored.largest:
            raise ValueError(
                f"{path} has the token id {found}, and {prepared.prefix}.prepared.json says that its ids are "
                f"{stored.smallest} to {stored.largest}: the files do not belong together; {PREPARE_AGAIN}"
            )
    return stored


@dataclass(frozen=True, slots=True)
class _Source:
    """A `.bin` file in the state in which it was read."""

    path: str
    dtype: str
    num_bytes: int
    mtime_ns: int


def _sample(path: str, dtype: np.dtype) -> TokenRange:
    """Return the range of a sample of a file, or of all of a short one."""
    ids = _mapped(path, dtype)
    if len(ids) <= _SAMPLED_IDS:
        return _range_of([ids])
    size = _SAMPLED_IDS // _PIECES
    starts = np.linspace(0, len(ids) - size, _PIECES).astype(np.int64)
    return _range_of([ids[start : start + size] for start in starts])


@lru_cache(maxsize=1024)
def _read(source: _Source, kept_in: str) -> TokenRange:
    """Return the range of a whole file, as it was read before or by reading it now."""
    name = hashlib.sha256(os.path.abspath(source.path).encode()).hexdigest()[:32]
    kept_at = os.path.join(kept_in, f"{name}-token-ids.json")
    kept = _kept(kept_at, source)
    if kept is not None:
        return kept
    started_s = said_s = time.monotonic()
    ids = _mapped(source.path, np.dtype(source.dtype))
    ranges = []
    for start in range(0, len(ids), _CHUNK):
        ranges.append(_range_of([ids[start : start + _CHUNK]]))
        if time.monotonic() - said_s > _SAY_EVERY_S:
            said_s = time.monotonic()
            share = min(1.0, (start + _CHUNK) / len(ids))
            console.say(
                f"{source.path}: looking once for its smallest and largest token id, {share:.0%} done"
            )
    found = TokenRange(
        min((each.smallest for each in ranges), default=0), max((each.largest for each in ranges), default=-1)
    )
    if time.monotonic() - started_s > _LONG_S:
        _keep(kept_at, source, found)
    return found


def _mapped(path: str, dtype: np.dtype) -> np.ndarray:
    """Map a file of ids; an empty one cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if os.path.getsize(path) else np.zeros(0, dtype)


def _range_of(pieces: Iterable[np.ndarray]) -> TokenRange:
    """Return the range of all ids of some pieces."""
    whole = [piece for piece in pieces if len(piece)]
    smallest = min((int(piece.min()) for piece in whole), default=0)
    return TokenRange(smallest, max((int(piece.max()) for piece in whole), default=-1))


def _kept(path: str, source: _Source) -> TokenRange | None:
    """Return the range that was kept of a file in this very state; None if there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        if values["source"] == asdict(source):
            return TokenRange(int(values["smallest"]), int(values["largest"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _keep(path: str, source: _Source, found: TokenRange) -> None:
    """Keep a range. Several ranks may do so at once; where none can write, the next run reads again."""
    partial = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"source": asdict(source), **asdict(found)}, file)
        os.replace(partial, path)
