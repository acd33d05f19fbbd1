"""Datasets whose samples carry a stored teacher's features: the loader's workers read them, ahead of the step.

R positions of this rank, K blocks, P bytes a packed hidden state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_fdd.data.datasets import Sample
from megatron_fdd.data.store.identity import StoreIdentity
from megatron_fdd.data.store.segment import Bytes
from megatron_fdd.data.store.store import Wanted
from megatron_fdd.data.store.unit import as_ids, units_of_rows

# The entries of a sample, and so of a batch; the second only where a run has several teachers (`routed.py`).
FEATURES, TEACHER = "teacher_features", "teacher"

# By these names Megatron knows which batch sizes a dataset is read with.
_SPLITS = ("split", "index_split")

Ranges = tuple[tuple[int, int], ...]


class Features(Protocol):
    """Where features are read from: a `Store`, or a stream that is filled meanwhile.

    Attributes:
        identity: what they are of.
    """

    identity: StoreIdentity

    def read_into(self, block_numbers: Sequence[int], units: Sequence[Wanted]) -> None:
        """Read what is wanted of the units of one micro-batch, in their order; what `Store.read_into` says."""


class Reader(Protocol):
    """What reads the features of batches, packed: uint8, the samples first."""

    def shape(self, num_samples: int) -> tuple[int, ...]:
        """Return the shape of the features of some samples."""

    def read(self, batch: Mapping[str, Tensor], into: Bytes | None = None) -> Tensor:
        """Read the features of a batch of samples, to `into`, of that shape, or to new memory."""


@dataclass(frozen=True, slots=True)
class FeatureReader:
    """The part of each sample's features that one rank needs.

    Attributes:
        features: where they come from.
        blocks: which of the teacher's blocks, 1-based, increasing.
        ranges: the positions [first, last) of this rank in a sample, in the order of its hidden states.
    """

    features: Features
    blocks: tuple[int, ...]
    ranges: Ranges

    def shape(self, num_samples: int) -> tuple[int, int, int, int]:
        """Return the shape of the features of some samples: [B, K, R, P]."""
        length = sum(last - first for first, last in self.ranges)
        return num_samples, len(self.blocks), length, self.features.identity.token_bytes

    def read(self, batch: Mapping[str, Tensor], into: Bytes | None = None) -> Tensor:
        """Read the features of a batch of samples, packed: uint8 [B, K, R, P]. Zeros stand where it is padding.

        Args:
            into: where they go, of this shape; new memory if it is None.

        Raises:
            ValueError: the store lacks a unit of the batch, or is damaged.
        """
        tokens_BS, identity = as_ids(batch["tokens"].numpy()), self.features.identity
        _, num_blocks, length, width = shape = self.shape(len(tokens_BS))
        found = np.empty(shape, np.uint8) if into is None else into
        flat, size = memoryview(found.reshape(-1)), length * width
        wanted = []
        for number, (tokens, units) in enumerate(zip(tokens_BS, units_of_rows(batch), strict=True)):
            first, num_read = number * num_blocks * size, 0
            rows = [flat[at : at + size] for at in range(first, first + num_blocks * size, size)]
            for start, end in units:
                pieces = []
                for low, high, place in self._parts(start, end):
                    goes = slice(place * width, (place + high - low) * width)
                    pieces.append((low - start, high - start, [row[goes] for row in rows]))
                    num_read += high - low
                wanted.append(Wanted(tokens[start:end], pieces))
            if num_read < length:
                found[number] = 0
        self.features.read_into([identity.blocks.index(block) for block in self.blocks], wanted)
        return torch.from_numpy(found)

    def _parts(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return what this rank has of the positions [start, end): first, the one behind the last, and their place."""
        parts, at = [], 0
        for first, last in self.ranges:
            low, high = max(first, start), min(last, end)
            if low < high:
                parts.append((low, high, at + low - first))
            at += last - first
        return parts


class Asking(Protocol):
    """What asks for the features of a loader's micro-batches, ahead of it."""

    def __call__(self, loader: Any, batches: Iterable[Mapping[str, Tensor]], num_consumed: int) -> Any:
        """Return the loader to use.

        Args:
            batches: those of the loader, in its order and without end, each read when it is asked for.
            num_consumed: samples of the data set that the run has read before.
        """


class DatasetAround(Dataset[Sample]):
    """A dataset of as many samples as another one, read with the same batch sizes.

    Attributes:
        plain: the other one.
    """

    def __init__(self, dataset: Dataset[Sample] | Sequence[Sample]) -> None:
        self.plain: Any = dataset
        for name in _SPLITS:
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    def __len__(self) -> int:
        return len(self.plain)


class TaughtDataset(DatasetAround):
    """A dataset of `data/datasets.py` or of a training script, with `FEATURES` in each sample.

    Megatron's loaders read batch by batch instead (`data/store/loader.py`).

    Attributes:
        plain: the dataset itself.
        reader: of the features; None where this rank needs none, and only asks.
        ask: how its features are asked for, on the rank that asks for those of a stream.
    """

    def __init__(
        self,
        dataset: Dataset[Sample] | Sequence[Sample],
        reader: Reader | None,
        ask: Asking | None = None,
    ) -> None:
        super().__init__(dataset)
        self.reader, self.ask = reader, ask

    def __getitem__(self, index: int) -> Sample:
        sample = self.plain[index]
        if self.reader is None:
            return sample
        batch = {name: value[None] for name, value in sample.items()}
        return {**sample, FEATURES: self.reader.read(batch)[0]}


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
