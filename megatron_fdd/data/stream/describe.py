"""What happens in a stream, for people."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_fdd.data.stream.claims import owner_of
from megatron_fdd.data.stream.folder import describe_left, producer_path, producers, replicas, window_bytes
from megatron_fdd.data.stream.sign import read_sign
from megatron_fdd.host.disk import sized


def describe_stream(store: Path) -> Iterator[str]:
    """Yield lines about the stream of a store, if it has one.

    Times are those of the files, which another machine's clock may have written.
    """
    window = window_bytes(store)
    if window is None:
        return
    folders, used = replicas(store), 0
    owners: Counter[str] = Counter()
    lines = []
    for folder in folders:
        there, sign = folder.listing(), read_sign(folder.student) or {}
        for name in there.segments:
            used += _size(folder.segment(name))
        owners.update(owner for name in there.claims if (owner := owner_of(folder.claim(name))))
        lines.append(
            f"    replica {folder.replica}: {len(there.segments)} micro-batches are there, {len(there.asks)} are asked "
            f"for, {len(there.claims)} of them claimed; {sign.get('state', 'no training')}, {_age(folder.student)}"
        )
    yield f"  stream: {sized(used)} of a window of {sized(window)}"
    yield from lines
    for name, sign in producers(store).items():
        yield (
            f"    producer {name}: {sign.get('answered')} micro-batches answered, {owners.pop(name, 0)} claimed, "
            f"{_age(producer_path(store, name))}"
        )
    if left := describe_left(store):
        yield f"    {left.removeprefix('; ')}"
    for name, count in owners.items():
        yield f"    producer {name}: has no sign of life, {count} claimed"


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _age(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return f"last sign of life {max(0.0, time.time() - path.stat().st_mtime):.0f} s ago"
    return "no sign of life"
