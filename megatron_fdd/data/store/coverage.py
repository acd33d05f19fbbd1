"""The units of a run's data, counted over all samples that it reads: which of them does a store have?"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.training import training
from numpy.typing import NDArray

from megatron_fdd.data.store.index import Index
from megatron_fdd.data.store.unit import as_ids, unit_key, units_of

# Keys that are looked up together.
_LOOKED_UP = 4096

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Unit:
    """Where a unit's ids are: positions [first, last) of a sample of a dataset."""

    dataset: int
    sample: int
    first: int
    last: int


@dataclass(slots=True)
class Coverage:
    """What was found among the samples that were looked at.

    Attributes:
        missing: units that the store lacks by their keys, in the order of the data.
        keys: of all units; each once.
        example: the first unit of all; None without any.
        num_read, tokens_read: units and tokens as often as the run reads them.
    """

    missing: dict[bytes, Unit]
    keys: set[bytes]
    example: Unit | None = None
    num_read: int = 0
    tokens_read: int = 0

    @property
    def missing_tokens(self) -> int:
        """Tokens of the units that the store lacks."""
        return sum(unit.last - unit.first for unit in self.missing.values())


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


def find_missing(
    sources: Sequence[Source],
    index: Index,
    *,
    deal: tuple[int, int] = (0, 1),
    on_sample: Callable[[], object] = lambda: None,
) -> Coverage:
    """Look up every unit of the samples that a run reads.

    Args:
        deal: number of this rank, and how many ranks deal the samples among them.
        on_sample: called after each sample, for a progress bar.
    """
    waiting: list[tuple[bytes, Unit]] = []
    found = Coverage({}, set())

    def look_up() -> None:
        if waiting:
            has = index.has([key for key, _ in waiting])
            found.missing |= {key: unit for (key, unit), there in zip(waiting, has, strict=True) if not there}
            waiting.clear()

    for number, source in enumerate(sources):
        for sample in range(deal[0], source.num_samples, deal[1]):
            for unit, ids in _units(source.dataset[sample], number, sample):
                found.num_read, found.tokens_read = found.num_read + 1, found.tokens_read + len(ids)
                key = unit_key(ids)
                found.example = found.example or unit
                if key not in found.keys:
                    found.keys.add(key)
                    waiting.append((key, unit))
                    if len(waiting) == _LOOKED_UP:
                        look_up()
            on_sample()
    look_up()
    return found


def joined(shares: Sequence[Coverage]) -> Coverage:
    """Join what several ranks have found in their shares of the samples."""
    missing: dict[bytes, Unit] = {}
    for share in shares:
        for key, unit in share.missing.items():
            missing[key] = min(unit, missing.get(key, unit), key=_place)
    examples = [share.example for share in shares if share.example is not None]
    return Coverage(
        dict(sorted(missing.items(), key=lambda item: _place(item[1]))),
        set().union(*(share.keys for share in shares)),
        min(examples, key=_place, default=None),
        sum(share.num_read for share in shares),
        sum(share.tokens_read for share in shares),
    )


def _place(unit: Unit) -> tuple[int, int, int]:
    return unit.dataset, unit.sample, unit.first


def whereabouts(source: Source, unit: Unit) -> str:
    """Say where a unit's sample comes from: the set, and the document in which the sample begins."""
    dataset, sample = source.dataset, unit.sample
    if isinstance(dataset, BlendedDataset):
        number, sample = int(dataset.dataset_index[sample]), int(dataset.dataset_sample_index[sample])
        dataset = dataset.datasets[number]
    place = f"{source.name} sample {unit.sample}, tokens {unit.first} to {unit.last - 1}"
    low = getattr(dataset, "dataset", None)
    path = getattr(getattr(low, "ids", low), "path_prefix", None)
    if isinstance(dataset, GPTDataset) and path is not None:
        row = dataset.sample_index[int(dataset.shuffle_index[sample])]
        return f"{place} (begins in document {int(dataset.document_index[int(row[0])])} of {path})"
    return place if path is None else f"{place} (of {path})"


def read_ids(sources: Sequence[Source], unit: Unit) -> Ids:
    """Read the ids of a unit again."""
    tokens = sources[unit.dataset].dataset[unit.sample]["tokens"].numpy()
    return as_ids(tokens[unit.first : unit.last])


def _units(sample: Any, dataset: int, number: int) -> Iterator[tuple[Unit, Ids]]:
    tokens = sample["tokens"].numpy()
    for first, last in units_of(sample):
        yield Unit(dataset, number, first, last), as_ids(tokens[first:last])
