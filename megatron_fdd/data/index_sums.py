"""Sums of the files of Megatron's index cache: a changed bit would give every later run other samples, without a word.

`NAME.npy.xxh3` beside a file has the xxh3 sum of its bytes, written when a run has built or read it for the first time.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from megatron_fdd.host.disk import replacing
from megatron_fdd.host.file_sums import sum_of

# What Megatron's description of an index says of the runs that read it, and the name in `args`.
_OF_RUNS = {"sequence_length": "seq_length", "random_seed": "seed"}


def keep_sums(paths: Iterable[Path]) -> None:
    """Write the sums of files that have none yet. Where that is not possible, the next run tries again."""
    for path in paths:
        place = sum_place(path)
        if not place.exists():
            with suppress(OSError), replacing(place, shared=True) as partial:
                partial.write_text(_sum(path), encoding="utf-8")


def differs(path: Path) -> bool:
    """Whether a file has other bytes than when its sum was written; not if it has none."""
    try:
        return sum_place(path).read_text(encoding="utf-8", errors="replace") != _sum(path)
    except OSError:
        return False


def sum_place(path: Path) -> Path:
    """Return where the sum of a file is."""
    return path.with_name(f"{path.name}.xxh3")


def may_be_read_by(args: argparse.Namespace, path: Path) -> bool:
    """Whether a run may read a file of the cache: Megatron's description of it tells of no other run.

    The folder holds what all runs on the same data have left, and to read all of it at each start could take minutes.
    """
    described = path.with_name(f"{path.name.rpartition('-')[0]}-description.txt")
    try:
        text = described.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return all(
        int(value) == getattr(args, name)
        for key, name in _OF_RUNS.items()
        for value in re.findall(rf'"{key}": ([0-9]{{1,18}})\b', text)
    )


def _sum(path: Path) -> str:
    return sum_of(path, 0, path.stat().st_size)
