"""Loaders with features: the next batches are read while one is used, and no batch's memory is used by another one."""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import megatron.training.training as megatron_training
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_fdd.data.batch import Wait, checked_batches
from megatron_fdd.data.store import loader
from megatron_fdd.data.store.loader import ThreadedLoader, read_ahead, taught_loader
from megatron_fdd.data.store.slots import Slots
from megatron_fdd.data.store.taught import FEATURES, FeatureReader, TaughtDataset
from tests.data.store.made import P, T, file_of, flip, opened, unit, write

LENGTH, ROWS, NUM_BATCHES = 70, 2, 12
UNITS = [unit(LENGTH, number) for number in range(ROWS * NUM_BATCHES)]
LONGEST_S = 60.0


class Told(Dataset[dict[str, Tensor]]):
    """Samples of one unit each, which tell when they are read."""

    def __init__(self) -> None:
        self.is_read = [multiprocessing.Event() for _ in UNITS]

    def __len__(self) -> int:
        return len(UNITS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.is_read[index].set()
        ones = torch.ones(LENGTH)
        tokens = torch.from_numpy(UNITS[index][0]).long()
        masks = {"token_mask": ones, "loss_mask": ones}
        return {"tokens": tokens, "labels": tokens, "position_ids": torch.arange(LENGTH), **masks}


@pytest.fixture
def reader(tmp_path: Path) -> FeatureReader:
    write(tmp_path, UNITS)
    return FeatureReader(opened(tmp_path), (2, 4, 6), ((0, LENGTH),))


def taught(reader: FeatureReader, workers: int, *, used: int = 1, ahead: int = 2) -> tuple[Told, Any]:
    dataset = Told()
    plain: DataLoader[Any] = DataLoader(dataset, batch_size=ROWS, num_workers=workers)
    return dataset, taught_loader(plain, reader, ROWS, used=used, ahead=ahead)


def assert_right(batch: dict[str, Tensor], number: int) -> None:
    for row, features in enumerate(batch[FEATURES]):
        np.testing.assert_array_equal(features.numpy(), UNITS[number * ROWS + row][1])


WORKERS = [0, pytest.param(2, marks=pytest.mark.tier("default"))]


@pytest.mark.parametrize("workers", WORKERS)
def test_the_next_batches_are_read_while_one_is_used(reader: FeatureReader, workers: int) -> None:
    """The order of events shows it: nobody asks for a next batch while the test waits for them to be read."""
    dataset, batches = taught(reader, workers, ahead=4)
    iterator = iter(batches)
    for number in range(NUM_BATCHES - 5):
        batch = next(iterator)
        last = (number + 1 + 4) * ROWS
        assert dataset.is_read[last - 1].wait(LONGEST_S)
        assert not dataset.is_read[last].is_set()
        assert_right(batch, number)


def test_reading_begins_before_a_batch_is_asked_for(reader: FeatureReader) -> None:
    dataset, batches = taught(reader, 0)
    iterator = iter(batches)
    assert dataset.is_read[2 * ROWS - 1].wait(LONGEST_S)
    del iterator


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kept", [1, 3, NUM_BATCHES])
def test_a_batch_stays_what_it_is_as_long_as_it_is_used(
    reader: FeatureReader, workers: int, kept: int
) -> None:
    """Twice over the data, also when more batches are kept than there are slots."""
    _, batches = taught(reader, workers, used=2)
    for _ in range(2):
        using: list[tuple[int, dict[str, Tensor]]] = []
        for number, batch in enumerate(batches):
            using = [*using, (number, batch)][-kept:]
            for each in using:
                assert_right(each[1], each[0])
        assert number == NUM_BATCHES - 1 == len(batches) - 1


def test_memory_is_used_again(reader: FeatureReader) -> None:
    _, batches = taught(reader, 0)
    places = set()
    for batch in batches:
        places.add(batch[FEATURES].data_ptr())
        del batch
    assert len(places) <= 5 < NUM_BATCHES


def test_a_slot_is_free_when_the_last_view_of_it_is_gone() -> None:
    slots = Slots(10, 2, 1)
    taken = slots.take(1, (2, 5))
    assert taken is not None
    taken.array[:] = 7
    view = taken.tensor()[1]
    del taken
    assert slots.take(1, (2, 5)) is None  # of this worker no other
    assert slots.take(0, (2, 5)) is not None
    assert view.tolist() == [7] * 5
    del view
    assert slots.take(1, (2, 5)) is not None


def test_a_batch_that_is_too_large_gets_no_slot() -> None:
    slots = Slots(10, 0, 1)
    assert slots.take(0, (10_000,)) is None
    assert slots.take(0, (10,)) is not None


@pytest.mark.parametrize("workers", WORKERS)
def test_damage_is_said_where_the_batch_is_asked_for(
    reader: FeatureReader, workers: int, tmp_path: Path
) -> None:
    (name,) = reader.features.index.names
    flip(file_of(tmp_path, name), -1)
    batches = checked_batches(iter(taught(reader, workers)[1]), 2000, LENGTH, 0, Wait())
    for number in range(NUM_BATCHES - 1):
        assert_right(next(batches), number)
    with pytest.raises(ValueError, match=f"{name}.safetensors: has other bytes than were written") as caught:
        next(batches)
    assert str(caught.value).startswith(f"iteration 1: {tmp_path}")
    assert "\n" not in str(caught.value)


def arguments(workers: int, micro_batches: int) -> Namespace:
    return Namespace(
        num_workers=workers,
        micro_batch_size=ROWS,
        global_batch_size=2 * ROWS * micro_batches,
        data_parallel_size=2,
        eval_micro_batch_size=1,
        eval_global_batch_size=2,
    )


@pytest.mark.parametrize(
    ("workers", "whole_steps", "ahead"),
    [(0, False, 2), (2, False, 4), (0, True, 7), (2, True, 8), (4, True, 8), (7, True, 14)],
)
def test_as_much_is_read_ahead_as_a_step_begins_with(workers: int, whole_steps: bool, ahead: int) -> None:
    assert read_ahead(arguments(workers, 7), whole_steps=whole_steps) == ahead


def test_validation_counts_where_its_steps_have_more_batches() -> None:
    args = arguments(0, 7)
    args.eval_global_batch_size = 24
    assert read_ahead(args, whole_steps=True) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_megatrons_loaders_of_taught_datasets_read_ahead(reader: FeatureReader, workers: int) -> None:
    def build(dataset: Sequence[Any] | None, consumed_samples: int) -> DataLoader[Any] | None:
        assert consumed_samples == 3
        return None if dataset is None else DataLoader(dataset, batch_size=ROWS, num_workers=workers)  # type: ignore[arg-type]

    dataset = Told()
    with patch.object(megatron_training, "build_pretraining_data_loader", build):
        with (
            patch.object(loader, "get_args", lambda: arguments(workers, 7)),
            loader.installed(whole_steps=True),
        ):
            found: Any = megatron_training.build_pretraining_data_loader(TaughtDataset(dataset, reader), 3)
            other: Any = megatron_training.build_pretraining_data_loader(dataset, 3)
            assert megatron_training.build_pretraining_data_loader(None, 3) is None
        assert megatron_training.build_pretraining_data_loader is build
    assert type(other) is DataLoader
    assert not isinstance(other.collate_fn, loader.Collate)
    if workers:
        assert found.prefetch_factor == 4
        return
    assert isinstance(found, ThreadedLoader)
    iterator = iter(found)
    assert dataset.is_read[7 * ROWS - 1].wait(LONGEST_S)
    batch = next(iterator)
    assert batch[FEATURES].shape == (ROWS, T, LENGTH, P)
    assert_right(batch, 0)
