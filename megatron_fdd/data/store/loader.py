"""Loaders that read a stored teacher's features ahead of the step, into memory that is used again."""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import megatron.training.training as megatron_training
import torch
from megatron.training import get_args
from torch.utils.data import DataLoader, default_collate, get_worker_info

from megatron_fdd.data.datasets import Sample
from megatron_fdd.data.store.slots import Slots
from megatron_fdd.data.store.taught import FEATURES, Reader, TaughtDataset
from megatron_fdd.host.patches.table import replaced

# Micro-batches that each worker reads ahead, torch's default; as many without workers.
_AHEAD = 2

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Collate:
    """What makes a batch of samples, in a loader's worker or thread: its features are read to their place in it."""

    reader: Reader
    slots: Slots

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch with its features.

        Raises:
            ValueError: what `FeatureReader.read` raises.
        """
        batch, worker = default_collate(list(samples)), get_worker_info()
        slot = self.slots.take(0 if worker is None else worker.id, self.reader.shape(len(samples)))
        if slot is None:
            return {**batch, FEATURES: self.reader.read(batch)}
        self.reader.read(batch, slot.array)
        return {**batch, FEATURES: slot.tensor() if worker is None else slot}


class ThreadedLoader:
    """A loader without workers, whose next batches a thread reads while the last one is used.

    Args:
        ahead: how many batches wait at most, the one included that is being read.
    """

    def __init__(self, loader: DataLoader[Any], ahead: int) -> None:
        self._loader, self._ahead = loader, ahead

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Begin to read; an error of a batch is raised where that batch is asked for."""
        batches = iter(self._loader)
        thread = ThreadPoolExecutor(1)
        if torch.cuda.is_available():  # else memory would be pinned by way of the first device, on every rank
            thread.submit(torch.cuda.set_device, torch.cuda.current_device())
        waiting = deque(thread.submit(next, batches, None) for _ in range(self._ahead))
        return self._taken(batches, thread, waiting)

    @staticmethod
    def _taken(
        batches: Iterator[Batch], thread: ThreadPoolExecutor, waiting: deque[Future[Batch | None]]
    ) -> Iterator[Batch]:
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, batches, None))
                yield batch
                del batch
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


def taught_loader(
    loader: DataLoader[Any], reader: Reader, rows: int, *, used: int, ahead: int
) -> DataLoader[Any] | ThreadedLoader:
    """Return a loader of the same batches with their features.

    Args:
        loader: of samples without features; not iterated yet.
        rows: samples of a batch.
        used: how many batches are in use at once.
        ahead: how many are read ahead by all workers.
    """
    workers = max(1, loader.num_workers)
    each = ahead // workers
    num_bytes = math.prod(reader.shape(rows))
    # One more is in the hands of whoever reads or waits.
    slots = Slots(num_bytes, loader.num_workers, each + 1 + math.ceil(used / workers))
    loader.collate_fn = Collate(reader, slots)
    if not loader.num_workers:
        return ThreadedLoader(loader, each)
    loader.prefetch_factor = each
    return loader


def read_ahead(args: argparse.Namespace, *, whole_steps: bool) -> int:
    """Return how many micro-batches a loader reads ahead: those of the next step, where it begins with all of them."""
    workers = max(1, args.num_workers)
    each = -(-micro_batches(args) // workers) if whole_steps else 0
    return workers * max(_AHEAD, each)


def micro_batches(args: argparse.Namespace) -> int:
    """Return how many micro-batches a rank takes in a step, of training or of validation, the larger."""
    training = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    rows = getattr(args, "eval_micro_batch_size", None) or args.micro_batch_size
    validation = getattr(args, "eval_global_batch_size", None) or args.global_batch_size
    return max(training, validation // (rows * args.data_parallel_size))


def _batches(dataset: Any, sampler: Iterable[Sequence[int]]) -> Iterator[Batch]:
    """Yield the batches of a sampler again and again, as Megatron's cyclic loaders do."""
    while True:
        number = -1
        for number, indices in enumerate(sampler):  # noqa: B007
            yield default_collate([dataset[index] for index in indices])
        if number < 0:
            return


def installed(*, whole_steps: bool) -> AbstractContextManager[None]:
    """Replace, in a `with` block, what builds Megatron's loaders: those of a `TaughtDataset` read ahead.

    Args:
        whole_steps: whether a step begins when all of its batches are there.
    """
    original = megatron_training.build_pretraining_data_loader

    def build(dataset: Any, consumed_samples: int) -> Any:
        if not isinstance(dataset, TaughtDataset):
            return original(dataset, consumed_samples)
        args = get_args()
        rows = max(args.micro_batch_size, getattr(args, "eval_micro_batch_size", None) or 0)
        loader = original(dataset.plain, consumed_samples)
        if dataset.reader is not None:
            ahead = read_ahead(args, whole_steps=whole_steps)
            loader = taught_loader(loader, dataset.reader, rows, used=micro_batches(args), ahead=ahead)
        if dataset.ask is None:
            return loader
        sampler = original(dataset.plain, consumed_samples).batch_sampler
        return dataset.ask(loader, _batches(dataset.plain, sampler), consumed_samples)

    return replaced({"megatron.training.training.build_pretraining_data_loader": build})
