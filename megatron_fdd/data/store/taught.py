"""Datasets whose samples carry a stored teacher's features: the loader's workers read them, ahead of the step.

R positions of this rank, K blocks, P bytes a packed hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_fdd.data.datasets import Sample
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.unit import as_ids, units_of

# The entry of a sample, and so of a batch.
FEATURES = "teacher_features"
# By these names Megatron knows which batch sizes a dataset is read with.
_SPLITS = ("split", "index_split")

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class FeatureReader:
    """The part of each sample's features that one rank needs.

    Attributes:
        blocks: which of the teacher's blocks, 1-based, increasing.
        ranges: the positions [first, last) of this rank in a sample, in the order of its hidden states.
    """

    store: Store
    blocks: tuple[int, ...]
    ranges: Ranges

    def read(self, sample: Mapping[str, Tensor]) -> Tensor:
        """Read the features of a sample, packed: uint8 [K, R, P]. Zeros stand where it is padding.

        Raises:
            ValueError: the store lacks a unit of the sample, or is damaged.
        """
        identity = self.store.identity
        numbers = [identity.blocks.index(block) for block in self.blocks]
        length = sum(last - first for first, last in self.ranges)
        found = np.empty((len(numbers), length, identity.token_bytes), np.uint8)
        tokens, is_read = sample["tokens"].numpy(), np.zeros(length, np.bool_)
        for start, end in units_of(sample):
            pieces, at = [], 0
            for first, last in self.ranges:
                low, high = max(first, start), min(last, end)
                if low < high:
                    place = slice(at + low - first, at + high - first)
                    pieces.append((low - start, high - start, found[:, place]))
                    is_read[place] = True
                at += last - first
            if pieces:
                self.store.read_into(as_ids(tokens[start:end]), numbers, pieces)
        if not is_read.all():
            found[:, ~is_read] = 0
        return torch.from_numpy(found)


class TaughtDataset(Dataset[Sample]):
    """A dataset of `data/datasets.py` or of a training script, with `FEATURES` in each sample."""

    def __init__(self, dataset: Dataset[Sample] | Sequence[Sample], reader: FeatureReader) -> None:
        self._dataset: Any = dataset
        self._reader = reader
        for name in _SPLITS:
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self._dataset[index]
        return {**sample, FEATURES: self._reader.read(sample)}


def rank_ranges(
    length: int, *, context: tuple[int, int] = (0, 1), sequence: tuple[int, int] = (0, 1)
) -> Ranges:
    """Return the positions of a sequence that one rank's hidden states are of.

    Args:
        length: of the whole sequence; a multiple of what it is cut into.
        context: number of this rank, and how many share the sequence: each has two of twice as many pieces, the r-th
            from either end (Megatron's zig-zag).
        sequence: number and count of the tensor-parallel ranks that share those by sequence parallelism.
    """
    rank, size = context
    positions = [(0, length)]
    if size > 1:
        piece = length // (2 * size)
        positions = [(each * piece, (each + 1) * piece) for each in (rank, 2 * size - 1 - rank)]
    share = sum(last - first for first, last in positions) // sequence[1]
    begin, end = sequence[0] * share, (sequence[0] + 1) * share
    ranges, at = [], 0
    for first, last in positions:
        low, high = max(begin, at), min(end, at + last - first)
        if low < high:
            ranges.append((first + low - at, first + high - at))
        at += last - first
    return tuple(ranges)
