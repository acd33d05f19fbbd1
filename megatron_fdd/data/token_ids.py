"""The smallest and the largest token id of a set, and the check that every holder of a vocabulary has them.

A set of `fdd prepare` stores both ids; a sample of its file must lie between them. The file of any other set is read
once in a job: before ranks can talk to each other, all look at the same sample of it; as soon as they can, each reads
its share. Both ids are then kept beside Megatron's index of the set, with the size and the time of the file that they
were read from, so that the next job need not read it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_fdd.data.index_file import mapped_numbers
from megatron_fdd.data.prepared import PREPARE_AGAIN, PreparedSet
from megatron_fdd.data.sources import cache_folder, open_sets
from megatron_fdd.host import console
from megatron_fdd.host.disk import replacing
from megatron_fdd.host.json_file import read_json
from megatron_fdd.host.together import together

# The name of a holder.
RUNS_TOKENIZER = "the tokenizer of this run"
# Ids that are looked at together.
_CHUNK = 1 << 24
# A file with more ids is only sampled where a rank is alone: so many ids, in pieces from its first to its last.
SAMPLED_IDS = 1_000_000
_PIECES = 64
# A long read says every so often how far it is.
_SAY_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class TokenRange:
    """All ids of a set lie between these two, inclusive. A set without ids has the range from 0 to -1."""

    smallest: int
    largest: int


def check_token_ids(
    args: argparse.Namespace, sets: Mapping[str, PreparedSet], holders: Mapping[str, int]
) -> None:
    """Refuse a set with a token id that is negative, or that not every holder of a vocabulary has, as far as is known.

    What is known of a set in `unread_sets` is a sample.

    Args:
        sets: the sets of the run, by prefix (`open_sets`).
        holders: the name of each holder, and the number of its ids.

    Raises:
        ValueError: names the set, the id, the holder and the remedy.
    """
    for prefix, prepared in sets.items():
        _check_range(prefix, token_range(prepared, cache_folder(args, prefix)), holders)


def check_all_token_ids(args: argparse.Namespace, holders: Mapping[str, int]) -> None:
    """Refuse sets as `check_token_ids`, after all ranks together have read the files of which it knew a sample.

    A file is taken to be the same on every node. Rank 0 keeps what was found.

    Collectives over all ranks: two all-gathers of a few words; if there is something to read, two more.

    Raises:
        ValueError: as `check_token_ids`. The same on every rank.
        OSError: a file cannot be read. The same on every rank.
    """
    with together():
        sets = open_sets(args)
        own_unread = unread_sets(args, sets)
    unread = _gathered(own_unread)[0]  # a node may not see yet, or no more, what is kept
    if not unread:
        return
    with together():
        sources = [_Source.of(sets[prefix]) for prefix in unread]
        own = _read_share(sources, dist.get_rank(), dist.get_world_size())
    found = [_joined(ranges) for ranges in zip(*_gathered(own), strict=True)]
    if dist.get_rank() == 0:
        for prefix, source, each in zip(unread, sources, found, strict=True):
            _keep(cache_folder(args, prefix), source, each)
    for prefix, each in zip(unread, found, strict=True):
        _check_range(prefix, each, holders)


def _gathered[T](own: T) -> list[T]:
    """Return what every rank has. Collectives: one all-gather over all ranks."""
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def unread_sets(args: argparse.Namespace, sets: Mapping[str, PreparedSet]) -> list[str]:
    """Return the sets of unknown origin of which no run has read more than a sample yet."""
    found = []
    for prefix, prepared in sets.items():
        source = _Source.of(prepared)
        is_long = prepared.info is None and source.num_ids > SAMPLED_IDS
        if is_long and _kept(cache_folder(args, prefix), source) is None:
            found.append(prefix)
    return found


def token_range(prepared: PreparedSet, kept_in: str) -> TokenRange:
    """Return the range of a set's ids, as `fdd prepare` has stored it or an earlier job has kept it; else of a sample.

    Args:
        kept_in: the folder in which a range is kept.

    Raises:
        ValueError: a sample of the file contradicts the range that is stored beside it.
    """
    source, info = _Source.of(prepared), prepared.info
    if info is None:
        return _kept(kept_in, source) or _sample(source)
    stored = TokenRange(info.smallest_token_id, info.largest_token_id)
    sample = _sample(source)
    for found in (sample.smallest, sample.largest):
        if not _is_empty(sample) and not stored.smallest <= found <= stored.largest:
            raise ValueError(
                f"{source.path} has the token id {found}, and {prepared.prefix}.prepared.json says that its ids are "
                f"{stored.smallest} to {stored.largest}: the files do not belong together; {PREPARE_AGAIN}"
            )
    return stored


def _check_range(prefix: str, found: TokenRange, holders: Mapping[str, int]) -> None:
    """Refuse a range of ids that is not in every vocabulary."""
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


@dataclass(frozen=True, slots=True)
class _Source:
    """A `.bin` file in the state in which it was read."""

    path: str
    dtype: str
    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, prepared: PreparedSet) -> _Source:
        """Return the file of a set as it is now."""
        path = prepared.prefix + ".bin"
        status = os.stat(path)
        return cls(path, prepared.dtype.name, status.st_size, status.st_mtime_ns)

    @property
    def num_ids(self) -> int:
        """Number of ids in the file."""
        return self.num_bytes // np.dtype(self.dtype).itemsize

    def range(self, start: int, count: int) -> TokenRange:
        """Return the range of the ids from number `start` on, `count` of them or up to the end."""
        dtype = np.dtype(self.dtype)
        count = min(count, self.num_ids - start)
        if count == 0:
            return TokenRange(0, -1)
        ids = mapped_numbers(self.path, dtype, count, start * dtype.itemsize)
        return TokenRange(int(ids.min()), int(ids.max()))


@lru_cache(maxsize=1024)
def _sample(source: _Source) -> TokenRange:
    """Return the range of a sample of a file, or of all of a short one."""
    if source.num_ids <= SAMPLED_IDS:
        return source.range(0, source.num_ids)
    size = SAMPLED_IDS // _PIECES
    starts = np.linspace(0, source.num_ids - size, _PIECES).astype(np.int64)
    return _joined(source.range(int(start), size) for start in starts)


def _read_share(sources: Sequence[_Source], rank: int, num_ranks: int) -> list[TokenRange]:
    """Return the range of a rank's share of each file; empty where it has none. All files are dealt out as one."""
    pieces = [
        (number, start) for number, each in enumerate(sources) for start in range(0, each.num_ids, _CHUNK)
    ]
    first, last = (len(pieces) * each // num_ranks for each in (rank, rank + 1))
    ranges: list[list[TokenRange]] = [[] for _ in sources]
    said_s = time.monotonic()
    for index, (number, start) in enumerate(pieces[first:last]):
        if time.monotonic() - said_s > _SAY_EVERY_S:
            said_s = time.monotonic()
            console.say(
                f"{sources[number].path}: looking once for its smallest and largest token id, "
                f"{index / (last - first):.0%} of rank 0's share of the data done"
            )
        ranges[number].append(sources[number].range(start, _CHUNK))
    return [_joined(each) for each in ranges]


def _is_empty(found: TokenRange) -> bool:
    return found.smallest > found.largest


def _joined(ranges: Iterable[TokenRange]) -> TokenRange:
    """Return the range of all ids of which these are ranges."""
    whole = [each for each in ranges if not _is_empty(each)]
    smallest = min((each.smallest for each in whole), default=0)
    return TokenRange(smallest, max((each.largest for each in whole), default=-1))


def _kept_at(kept_in: str, source: _Source) -> Path:
    name = hashlib.sha256(os.path.abspath(source.path).encode()).hexdigest()[:32]
    return Path(kept_in) / f"{name}-token-ids.json"


@lru_cache(maxsize=1024)
def _kept(kept_in: str, source: _Source) -> TokenRange | None:
    """Return the range that was kept of a file in this very state; None if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values = read_json(_kept_at(kept_in, source))
        if values["source"] == asdict(source):
            return TokenRange(int(values["smallest"]), int(values["largest"]))
    return None


def _keep(kept_in: str, source: _Source, found: TokenRange) -> None:
    """Keep a range. Where it cannot be written, the next job reads again."""
    path = _kept_at(kept_in, source)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as partial:
            partial.write_text(json.dumps({"source": asdict(source), **asdict(found)}), encoding="utf-8")
