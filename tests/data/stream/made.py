"""Streams in one process: a store to replay, asks of it, and a clock that tests turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_fdd.data.store.segment import write_segment
from megatron_fdd.data.store.store import Ids, Wanted
from megatron_fdd.data.stream.claims import Claimed, Claims
from megatron_fdd.data.stream.features import StreamFeatures
from megatron_fdd.data.stream.folder import ReplicaFolder, write_window
from tests.data.store.made import IDENTITY, P, T, Unit, unit, write

WINDOW = 1 << 20
# More than any test needs.
LONGEST_S = 20.0


class Hand:
    """A clock that a test turns by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def stream(path: Path) -> ReplicaFolder:
    """Begin a stream; return the folder of its first replica."""
    write(path)
    write_window(path, WINDOW)
    return ReplicaFolder(path, 0)


def batch(number: int, count: int = 2) -> list[Unit]:
    """Return the units of the n-th micro-batch."""
    return [unit(3 + number % 5 + 64 * each, 100 * number + each) for each in range(count)]


def ids_of(units: Sequence[Unit]) -> list[Ids]:
    return [ids for ids, _ in units]


def states_of(ids: Ids) -> Unit:
    """Return the unit with these ids, of the first 100 batches."""
    return KNOWN[ids.tobytes()]


KNOWN = {each[0].tobytes(): each for number in range(100) for each in batch(number)}


def answer(claimed: Claimed) -> None:
    """Answer as a producer does."""
    units = [states_of(ids) for ids in claimed.ask.units]
    path = claimed.folder.segment(claimed.ask.name)
    write_segment(claimed.folder.store, path, IDENTITY.digest, units)
    claimed.answered()


def answer_all(claims: Claims) -> int:
    """Answer all that is asked for; return how many asks that were."""
    count = 0
    while batches := claims.take(1, 1):
        for claimed in batches[0]:
            answer(claimed)
            count += 1
    return count


def reader(folder: ReplicaFolder, wait_s: float = LONGEST_S) -> StreamFeatures:
    return StreamFeatures(folder, IDENTITY, wait_s)


def wanted(units: Sequence[Unit]) -> tuple[list[Wanted], list[bytearray]]:
    """Return what reads all of some units, and where it goes: block by block, unit by unit."""
    places = [bytearray(len(ids) * P) for ids, _ in units for _ in range(T)]
    views = [memoryview(place) for place in places]
    rows = [views[T * number : T * number + T] for number in range(len(units))]
    return [Wanted(ids, [(0, len(ids), row)]) for (ids, _), row in zip(units, rows, strict=True)], places


def assert_reads(features: StreamFeatures, units: Sequence[Unit]) -> None:
    pieces, places = wanted(units)
    features.read_into(range(T), pieces)
    assert b"".join(places) == b"".join(states.tobytes() for _, states in units)


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end_s = time.monotonic() + LONGEST_S
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.005)
