"""The units of a run's data, counted over all samples that it reads: which of them does a store have?"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.training import training
from numpy.typing import NDArray

from megatron_fdd.data.store.index import Index
from megatron_fdd.data.store.unit import as_ids, unit_key, units_of

# Units that are gathered before those which come again are left out.
_GATHERED = 1 << 16
# A unit: its key as two numbers, and where it is first read.
UNIT = np.dtype(
    [
        ("high", "<u8"),
        ("low", "<u8"),
        ("sample", "<i8"),
        ("dataset", "<i4"),
        ("first", "<i4"),
        ("last", "<i4"),
    ]
)

Ids = NDArray[np.int32]
Table = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Unit:
    """Where a unit's ids are: positions [first, last) of a sample of a dataset."""

    dataset: int
    sample: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class RunUnits:
    """The units of the samples that a run reads.

    Attributes:
        table: of `UNIT`; each different unit once, where it is first read, in the order of the data.
        num_read, tokens_read: units and tokens as often as the run reads them.
    """

    table: Table
    num_read: int
    tokens_read: int

    def missing(self, index: Index) -> Table:
        """Return the units that a store lacks."""
        keys = np.stack([self.table["high"], self.table["low"]], axis=1).astype(">u8").tobytes()
        return self.table[~index.has([keys])]


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset of a run, and how many of its samples the run reads, from the first on."""

    name: str
    dataset: Any
    num_samples: int


def sources_of(datasets: Sequence[Any], args: argparse.Namespace) -> list[Source]:
    """Name the datasets that a provider returned, and count what the run reads of each.

    Args:
        datasets: train, validation and test; None or a list in the place of one.
        args: the run's validated arguments, Megatron's globals.
    """
    counts = training.get_train_valid_test_num_samples()
    sources = []
    for name, found, count in zip(("training", "validation", "test"), datasets, counts, strict=True):
        for dataset in found if isinstance(found, list) else [found]:
            if dataset is not None:
                reads_all = count is None or args.dataloader_type == "cyclic"
                sources.append(Source(name, dataset, len(dataset) if reads_all else min(count, len(dataset))))
    return sources


def count_share(
    sources: Sequence[Source],
    *,
    deal: tuple[int, int] = (0, 1),
    on_sample: Callable[[], object] = lambda: None,
) -> RunUnits:
    """Find every unit of this rank's share of the samples that a run reads.

    Memory: 36 bytes a different unit, a few times that while they are sorted.

    Args:
        deal: number of this rank, and how many ranks deal the samples among them.
        on_sample: called after each sample, for a progress bar.
    """
    known, parts, records = np.zeros(0, UNIT), [np.zeros(0, UNIT)], []
    num_read = tokens_read = 0
    for number, source in enumerate(sources):
        for sample in range(deal[0], source.num_samples, deal[1]):
            for unit, ids in _units(source.dataset[sample], number, sample):
                num_read, tokens_read = num_read + 1, tokens_read + len(ids)
                key = unit_key(ids)
                halves = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
                records.append((*halves, sample, number, unit.first, unit.last))
            on_sample()
            if len(records) >= _GATHERED:
                parts.append(np.array(records, UNIT))
                records.clear()
                if sum(map(len, parts)) > max(_GATHERED, len(known)):
                    known, parts = _first_places([known, *parts]), []
    return RunUnits(_first_places([known, *parts, np.array(records, UNIT)]), num_read, tokens_read)


def joined(shares: Sequence[RunUnits]) -> RunUnits:
    """Join what several ranks have found in their shares of the samples."""
    return RunUnits(
        _first_places([share.table for share in shares]),
        sum(share.num_read for share in shares),
        sum(share.tokens_read for share in shares),
    )


def _first_places(tables: Sequence[Table]) -> Table:
    """Return each unit once, where it is first read, in the order of the data."""
    table = np.concatenate(tables)
    table = table[np.lexsort([table[name] for name in ("first", "sample", "dataset", "low", "high")])]
    repeated = np.zeros(len(table), np.bool_)
    repeated[1:] = (table["high"][1:] == table["high"][:-1]) & (table["low"][1:] == table["low"][:-1])
    table = table[~repeated]
    return table[np.lexsort([table[name] for name in ("first", "sample", "dataset")])]


def places_of(table: Table) -> list[Unit]:
    """Return where the units of a table of `UNIT` are."""
    columns = [table[name].tolist() for name in ("dataset", "sample", "first", "last")]
    return [Unit(*place) for place in zip(*columns, strict=True)]


def read_ids(sources: Sequence[Source], units: Sequence[Unit]) -> list[Ids]:
    """Read the ids of some units again; a sample that has several is read once."""
    samples: dict[tuple[int, int], Ids] = {}
    for unit in units:
        place = unit.dataset, unit.sample
        if place not in samples:
            samples[place] = as_ids(sources[unit.dataset].dataset[unit.sample]["tokens"].numpy())
    return [samples[unit.dataset, unit.sample][unit.first : unit.last] for unit in units]


def first_unit(sources: Sequence[Source]) -> Ids:
    """Return the ids of the first unit of some data.

    Raises:
        ValueError: the data have none.
    """
    for number, source in enumerate(sources):
        for sample in range(source.num_samples):
            for _, ids in _units(source.dataset[sample], number, sample):
                return ids
    raise ValueError("the training of these flags reads no token: give --train-iters and data")


def _units(sample: Any, dataset: int, number: int) -> Iterator[tuple[Unit, Ids]]:
    tokens = sample["tokens"].numpy()
    for first, last in units_of(sample):
        yield Unit(dataset, number, first, last), as_ids(tokens[first:last])
