"""The work of a producer: the data that are its own, units that the store lacks, in batches of similar length."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_fdd.data.sources import data_prefixes
from megatron_fdd.data.store.coverage import Source, Table, Unit
from megatron_fdd.data.store.routed import picked
from megatron_fdd.plan.routing import FLAG, routes
from megatron_fdd.teach.request import TeachRequest


def own_sources(request: TeachRequest, args: argparse.Namespace, sources: Sequence[Source]) -> list[Source]:
    """Return what this teacher teaches of a training: all of it, or with several teachers its own data sets.

    Args:
        args: the training's, with its data flags.

    Raises:
        ValueError: the store is none of the training's, or a data set has not exactly one teacher.
    """
    if not request.teachers:
        return list(sources)
    own = [name for name, folder in request.teachers if Path(folder).resolve() == request.store.resolve()]
    if not own:
        told = ", ".join(f"{name}={folder}" for name, folder in request.teachers)
        raise ValueError(
            f"--store {request.store}: is none of the stores of {FLAG} {told}; give the training's, or leave "
            f"{FLAG} out to teach all of its data"
        )
    by_name = routes([name for name, _ in request.teachers], data_prefixes(args))
    number_of = {prefix: int(name in own) for name, prefixes in by_name.items() for prefix in prefixes}
    return picked(sources, number_of, 1)


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
