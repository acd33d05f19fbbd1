"""Several stored teachers of one run: each data set has its own, and each sample says whose it is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from numpy.typing import NDArray
from torch import Tensor

from megatron_fdd.data.datasets import Sample
from megatron_fdd.data.full_validation import FilledDataset
from megatron_fdd.data.store.coverage import Source
from megatron_fdd.data.store.segment import Bytes
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.taught import TEACHER, DatasetAround, FeatureReader

# Megatron's blend adds it to a sample: the number of the set in the blend.
_SET = "dataset_id"


@dataclass(frozen=True, slots=True)
class NamedStore:
    """A stored teacher of a run.

    Attributes:
        name: the user's, for data sets, plan and log; empty for the only one of a run.
        prefixes: the data sets that it teaches; of the only one none are known.
    """

    name: str
    store: Store
    prefixes: tuple[str, ...] = ()


class RoutedDataset(DatasetAround):
    """A dataset of ours, or Megatron's blend of some, whose samples have the number of their teacher.

    Attributes:
        plain: the dataset itself.

    Raises:
        KeyError: a set of it has no teacher.
    """

    def __init__(self, dataset: Any, number_of: Mapping[str, int]) -> None:
        super().__init__(dataset)
        self._numbers = [number_of[prefix] for prefix in prefixes_of(dataset)]

    def __getitem__(self, index: int) -> Sample:
        sample = self.plain[index]
        return {**sample, TEACHER: torch.tensor(self._numbers[int(sample.get(_SET, 0))])}

    def samples_of(self, number: int, num_samples: int) -> PickedSamples:
        """Return those of the first samples that are a teacher's."""
        sets = np.zeros(num_samples, np.int64)
        inner = _unfilled(self.plain)
        if isinstance(inner, BlendedDataset) and num_samples:
            inner[0]  # it may read its index late
            sets = np.asarray(inner.dataset_index[:num_samples], np.int64)
        return PickedSamples(self.plain, np.flatnonzero(np.array(self._numbers)[sets] == number))


class PickedSamples(Sequence[Sample]):
    """Some samples of a dataset.

    Attributes:
        dataset: the dataset itself.
        numbers: of the samples in it.
    """

    def __init__(self, dataset: Any, numbers: NDArray[np.int64]) -> None:
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[int(self.numbers[index])]

    @property
    def digest(self) -> str:
        """The hash of the samples' numbers."""
        return hashlib.sha256(self.numbers.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class RoutedReader:
    """The part of each sample's features that one rank needs, of the sample's own teacher.

    Teachers differ in width, form and number of blocks. So each sample has as many bytes as the largest needs, its own
    [K, R, P] (`FeatureReader`) first.

    Attributes:
        readers: one for each teacher, by its number.
    """

    readers: tuple[FeatureReader, ...]

    def shape(self, num_samples: int) -> tuple[int, int]:
        """Return the shape of the features of some samples."""
        return num_samples, max(math.prod(reader.shape(1)) for reader in self.readers)

    def read(self, batch: Mapping[str, Tensor], into: Bytes | None = None) -> Tensor:
        """Read the features of a batch of samples: uint8 [samples, bytes]. Behind a sample's own lies nothing of use.

        Raises:
            ValueError: what `FeatureReader.read` raises.
        """
        numbers = batch[TEACHER].tolist()
        found = np.zeros(self.shape(len(numbers)), np.uint8) if into is None else into
        for row, number in enumerate(numbers):
            reader = self.readers[number]
            shape = reader.shape(1)
            own = {name: value[row : row + 1] for name, value in batch.items()}
            reader.read(own, found[row, : math.prod(shape)].reshape(shape))
        return torch.from_numpy(found)


def picked(sources: Sequence[Source], number_of: Mapping[str, int], number: int) -> list[Source]:
    """Return what a run reads of one teacher's data sets.

    Args:
        number_of: the number of each data set's teacher.
        number: of the teacher.
    """
    found = []
    for source in sources:
        whole = source.dataset
        routed = whole if isinstance(whole, RoutedDataset) else RoutedDataset(whole, number_of)
        own = routed.samples_of(number, source.num_samples)
        found.append(replace(source, dataset=own, num_samples=len(own)))
    return found


def prefixes_of(dataset: Any) -> list[str]:
    """Return the data sets of a dataset of ours or of a blend, in the order of their numbers there."""
    inner = _unfilled(dataset)
    sets = inner.datasets if isinstance(inner, BlendedDataset) else [inner]
    return [each.dataset.path_prefix for each in sets]


def _unfilled(dataset: Any) -> Any:
    """Return the dataset behind the filler of `--full-validation`."""
    return dataset.filled if isinstance(dataset, FilledDataset) else dataset
