"""Producers that write at once, and one that is killed: the store is whole, and what was there stays."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from megatron_fdd.data.store.segment import segment_names
from tests.data.store.made import IDENTITY, opened
from tests.hostile.store_kills import UNITS_A_SEGMENT, differences, produce, started

NUM_UNITS = 120


def produce_some(path: Path, seed: int) -> None:
    produce(path, seed, NUM_UNITS)


def produce_slowly(path: Path, seed: int) -> None:
    """Wait before each file is renamed, so that a kill finds one that is not."""
    replace = Path.replace

    def later(self: Path, target: Path) -> Path:
        time.sleep(0.05)
        return replace(self, target)

    Path.replace = later  # type: ignore[assignment, method-assign]
    produce_some(path, seed)


@pytest.mark.tier("default")
def test_two_producers_write_the_same_units_at_once(tmp_path: Path) -> None:
    running = [started(produce_some, tmp_path, seed) for seed in (0, 0)]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    assert len(opened(tmp_path).index) == NUM_UNITS
    assert len(list(segment_names(tmp_path))) == NUM_UNITS // UNITS_A_SEGMENT  # the same files
    assert differences(tmp_path, NUM_UNITS) == 0
    assert list(tmp_path.rglob(".*")) == []


@pytest.mark.tier("all")
def test_a_producer_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    there: set[str] = set()
    for kill in range(3):
        process = started(produce_slowly, tmp_path, 0)
        while process.is_alive() and not (
            set(segment_names(tmp_path)) - there and len(list(tmp_path.rglob(".*.unfinished"))) > kill
        ):
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        now = set(segment_names(tmp_path))
        assert now > there
        assert len(list(tmp_path.rglob(".*.unfinished"))) == kill + 1
        there = now
        assert opened(tmp_path).identity == IDENTITY
    produce_some(tmp_path, 0)
    assert len(list(segment_names(tmp_path))) == NUM_UNITS // UNITS_A_SEGMENT
    assert differences(tmp_path, NUM_UNITS) == 0
