"""The loop of a producer: units in batches through an engine, and their features into the store."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_fdd.data.store.coverage import Ids, Source, Unit, read_ids
from megatron_fdd.data.store.segment import Bytes, SegmentWriter
from megatron_fdd.teach.engine import Engine
from megatron_fdd.teach.progress import TeachProgress


def produce(
    engine: Engine,
    store: Path,
    sources: Sequence[Source],
    all_batches: Sequence[Sequence[Unit]],
    progress: TeachProgress,
) -> None:
    """Run batches of units, and write their features.

    Replicas take every n-th batch. All run equally many, because experts may be shared by replicas: one that has none
    left runs the last one again and throws it away.

    Memory: a batch's hidden states, those of one segment, and one batch that is being written.

    Raises:
        ValueError: the disk cannot take a segment, or a hidden state is not finite.
    """
    identity = engine.identity
    writer = SegmentWriter(store, identity.digest, len(identity.blocks), identity.token_bytes)
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as thread:
        for first in range(0, len(all_batches), engine.num_replicas):
            number = first + engine.replica
            batch = all_batches[min(number, len(all_batches) - 1)]
            units = read_ids(sources, batch)
            states = engine.states(units)
            if pending is not None:
                pending.result()
                pending = None
            if number < len(all_batches) and engine.writes:
                pending = thread.submit(_write, writer, units, states)
            together = all_batches[first : first + engine.num_replicas]
            progress.round(sum(unit.last - unit.first for each in together for unit in each))
        if pending is not None:
            pending.result()
    writer.flush()


def _write(writer: SegmentWriter, units: Sequence[Ids], states: Sequence[Bytes]) -> None:
    for ids, unit_states in zip(units, states, strict=True):
        writer.add(ids, unit_states)
