"""The work of producers: parts that share it out, and batches that fit."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_fdd.data.store.coverage import Unit
from megatron_fdd.data.store.unit import unit_key
from megatron_fdd.teach.work import batches, part_of

UNITS = {unit_key([number]): Unit(0, number, 0, 1) for number in range(1000)}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_parts_are_disjoint_complete_and_much_alike(count: int) -> None:
    parts = [part_of(UNITS, (number, count)) for number in range(count)]
    assert sorted(unit.sample for part in parts for unit in part) == list(range(1000))
    assert max(map(len, parts)) < 2 * 1000 / count + 20


def test_a_part_is_the_same_whatever_is_there_already() -> None:
    """Producers of an array of jobs begin at different times, and see different stores."""
    random = np.random.default_rng(1)
    for number in range(5):
        whole = {unit.sample for unit in part_of(UNITS, (number, 5))}
        missing = {key: unit for key, unit in UNITS.items() if random.random() < 0.3}
        some = {unit.sample for unit in part_of(missing, (number, 5))}
        assert some == whole & {unit.sample for unit in missing.values()}


def test_a_part_keeps_the_order_of_the_data() -> None:
    samples = [unit.sample for unit in part_of(UNITS, (1, 3))]
    assert samples == sorted(samples)


@pytest.mark.parametrize("most", [1, 30, 64, 1000, 10**9])
def test_batches_hold_every_unit_once_and_no_more_than_fits(most: int) -> None:
    random = np.random.default_rng(most)
    units = [Unit(0, number, 7, 7 + int(random.integers(1, 80))) for number in range(300)]
    cut = batches(units, most)
    assert sorted(unit.sample for batch in cut for unit in batch) == list(range(300))
    for batch in cut:
        longest = max(unit.last - unit.first for unit in batch)
        assert len(batch) == 1 or len(batch) * longest <= most
    lengths = [unit.last - unit.first for batch in cut for unit in batch]
    assert lengths == sorted(lengths, reverse=True)
    if most == 10**9:
        assert len(cut) == 1


def test_a_batch_takes_what_fits() -> None:
    units = [Unit(0, number, 0, length) for number, length in enumerate((4, 4, 4, 5, 9))]
    assert [[unit.sample for unit in batch] for batch in batches(units, 12)] == [[4], [3, 0], [1, 2]]
    assert batches([], 12) == []
