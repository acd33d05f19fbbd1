"""The loop of a producer: units in batches through an engine, and their features into the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from megatron_fdd.data.store.coverage import Ids, Source, Unit, read_ids
from megatron_fdd.data.store.segment import Bytes, SegmentWriter
from megatron_fdd.teach.engine import Engine


def produce(
    engine: Engine,
    store: Path,
    sources: Sequence[Source],
    all_batches: Sequence[Sequence[Unit]],
    *,
    shows_progress: bool,
    say: Callable[[str], None],
) -> int:
    """Run batches of units, and write their features; return how many tokens this rank wrote.

    Replicas take every n-th batch. All run equally many, because experts may be shared by replicas: one that has none
    left runs its last one again and throws it away.

    Memory: a batch's hidden states, those of one segment, and one segment that is being written.

    Raises:
        ValueError: the disk cannot take a segment, or a hidden state is not finite.
    """
    identity = engine.identity
    own = list(all_batches[engine.replica :: engine.num_replicas])
    num_rounds = -(-len(all_batches) // engine.num_replicas)
    writer = SegmentWriter(store, identity.digest, len(identity.blocks), identity.token_bytes)
    written = 0
    total = sum(unit.last - unit.first for batch in own for unit in batch)
    started_s = time.perf_counter()
    with (
        ThreadPoolExecutor(1) as thread,
        tqdm(
            total=total, unit="token", unit_scale=True, desc="teach", disable=not shows_progress or None
        ) as bar,
    ):
        pending: Future[None] | None = None
        for number in range(num_rounds):
            batch = own[number] if number < len(own) else all_batches[-1]
            units = [read_ids(sources, unit) for unit in batch]
            states = engine.states(units)
            if pending is not None:
                pending.result()
            if number < len(own) and engine.writes:
                pending = thread.submit(_write, writer, units, states)
                written += sum(map(len, units))
                bar.update(sum(map(len, units)))
        if pending is not None:
            pending.result()
    writer.flush()
    seconds = time.perf_counter() - started_s
    say(f"{written} tokens in {seconds:.1f} s, {written / max(seconds, 1e-9):.0f} tokens/s a replica")
    return written


def _write(writer: SegmentWriter, units: Sequence[Ids], states: Sequence[Bytes]) -> None:
    for ids, unit_states in zip(units, states, strict=True):
        writer.add(ids, unit_states)
