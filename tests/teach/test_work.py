"""The work of producers: parts that share it out, and batches that fit."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_fdd.data.store.coverage import UNIT, Unit
from megatron_fdd.data.store.unit import unit_key
from megatron_fdd.teach.work import batches, part_of

NUM = 1000
KEYS = [unit_key([number]) for number in range(NUM)]
UNITS = np.array(
    [
        (int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big"), number, 0, 0, 1)
        for number, key in enumerate(KEYS)
    ],
    UNIT,
)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 10**6])
def test_parts_are_those_of_the_keys(count: int) -> None:
    for number in range(0, count, -(-count // 7)):
        wanted = [at for at, key in enumerate(KEYS) if int.from_bytes(key, "big") % count == number]
        assert part_of(UNITS, (number, count))["sample"].tolist() == wanted
    if count < 100:
        sizes = [len(part_of(UNITS, (number, count))) for number in range(count)]
        assert sum(sizes) == NUM
        assert max(sizes) < 2 * NUM / count + 20


def test_a_part_is_the_same_whatever_is_there_already() -> None:
    """Producers of an array of jobs begin at different times, and see different stores."""
    random = np.random.default_rng(1)
    for number in range(5):
        whole = set(part_of(UNITS, (number, 5))["sample"].tolist())
        missing = UNITS[random.random(NUM) < 0.3]
        some = set(part_of(missing, (number, 5))["sample"].tolist())
        assert some == whole & set(missing["sample"].tolist())


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
