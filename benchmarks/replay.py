"""A producer of a stream that replays a finished store, at a set rate: streams without a teacher.

    python -m benchmarks.replay FINISHED STREAM --window-bytes 64MiB --tokens-per-s 20000

It is `fdd teach --follow` with another engine, so that all but the teacher is what it is in a real stream.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.identity import write_identity
from megatron_fdd.data.store.lens import LENS_FILE, StoredLens
from megatron_fdd.data.store.segment import Bytes
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.stream.folder import write_window
from megatron_fdd.teach.follow import follow
from megatron_fdd.teach.following import size_in_bytes

COMPANIONS = ("tokenizer", "hf")


class ReplayEngine:
    """An engine whose states are read from a finished store.

    Args:
        tokens_per_s: None: as fast as the disk is.
    """

    replica, num_replicas, writes = 0, 1, True

    def __init__(self, finished: Store, tokens_per_s: float | None = None) -> None:
        self.identity = finished.identity
        self._finished, self._rate = finished, tokens_per_s

    def lens(self, units: Sequence[Ids]) -> StoredLens | None:
        """Return nothing: `begin` copies the finished store's."""
        return None

    def states(self, units: Sequence[Ids]) -> list[Bytes]:
        """Return what the finished store has of some units, not sooner than the rate allows."""
        started_s = time.monotonic()
        numbers = range(len(self.identity.blocks))
        found = [self._finished.read(ids, numbers, 0, len(ids)) for ids in units]
        if self._rate is not None:
            due_s = sum(map(len, units)) / self._rate
            time.sleep(max(0.0, due_s - (time.monotonic() - started_s)))
        return found


def begin(finished: Store, stream: Path, window_bytes: int) -> None:
    """Begin a stream of the teacher of a finished store, or join it."""
    write_identity(stream, finished.identity)
    for name in COMPANIONS:
        if (finished.path / name).is_dir():
            shutil.copytree(finished.path / name, stream / name, dirs_exist_ok=True)
    write_window(stream, window_bytes)
    if not (stream / LENS_FILE).exists():
        (stream / LENS_FILE).parent.mkdir(exist_ok=True)
        part = (stream / LENS_FILE).with_name(".part")
        shutil.copyfile(finished.path / LENS_FILE, part)
        part.replace(stream / LENS_FILE)


def main(words: Sequence[str] | None = None) -> int:
    """Replay until the training has ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("finished", type=Path)
    parser.add_argument("stream", type=Path)
    parser.add_argument("--window-bytes", type=size_in_bytes, required=True)
    parser.add_argument("--tokens-per-s", type=float)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--idle-timeout", type=float, default=600.0)
    args = parser.parse_args(words)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    finished = Store.open(args.finished, "FINISHED")
    begin(finished, args.stream, args.window_bytes)
    engine = ReplayEngine(finished, args.tokens_per_s)
    follow(engine, args.stream, args.batch_tokens, args.idle_timeout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
