"""The work of a producer: units that the store lacks, its part of them, in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_fdd.data.store.coverage import Table, Unit


def part_of(missing: Table, part: tuple[int, int]) -> Table:
    """Return the units of one producer's part.

    A unit is of the part that its key says, so that producers that began at different times share the work alike.

    Args:
        missing: units that the store lacks, in the order of the data.
        part: number of this producer's part, and of all parts, below 2**31.
    """
    number, count = part
    # The key's remainder, from those of its halves.
    rest = missing["high"] % np.uint64(count) * np.uint64(2**64 % count) + missing["low"] % np.uint64(count)
    return missing[rest % np.uint64(count) == number]


def batches(units: Sequence[Unit], most_tokens: int) -> list[list[Unit]]:
    """Order units by length, else as they are, and cut them into batches; the longest first, which memory must hold.

    Args:
        most_tokens: of a batch with its padding; a longer unit is a batch of its own.
    """
    cut: list[list[Unit]] = []
    for unit in sorted(units, key=lambda unit: unit.first - unit.last):
        if cut and (len(cut[-1]) + 1) * (cut[-1][0].last - cut[-1][0].first) <= most_tokens:
            cut[-1].append(unit)
        else:
            cut.append([unit])
    return cut
