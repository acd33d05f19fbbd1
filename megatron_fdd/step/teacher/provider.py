"""The datasets of a run whose teachers are stored: looked up before a model is loaded, and read with their features."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.training.training import get_train_valid_test_num_samples, update_train_iters
from torch.utils.data import Dataset

from megatron_fdd.data.store.coverage import sources_of
from megatron_fdd.data.store.routed import RoutedDataset, RoutedReader, picked
from megatron_fdd.data.store.taught import Asking, FeatureReader, Features, Reader, TaughtDataset
from megatron_fdd.host.together import together
from megatron_fdd.host.topology import Topology
from megatron_fdd.step.teacher.coverage import check_coverage
from megatron_fdd.step.teacher.followed import FollowedStream
from megatron_fdd.step.teacher.stored import PlannedStore, read_blocks, read_ranges

NumSamples = Sequence[int | None]


class FeatureProvider:
    """A provider of the same datasets, whose samples carry what this rank's chunk needs of their teacher.

    Args:
        provider: with the interface of `data.provider.train_valid_test_provider`.
        stream: where the features come from, if the store is one.
    """

    def __init__(
        self,
        provider: Callable[..., Any],
        stores: Sequence[PlannedStore],
        args: argparse.Namespace,
        stream: FollowedStream | None = None,
    ) -> None:
        self._provider, self._stores, self._args, self._stream = provider, stores, args, stream
        self._number_of = {prefix: at for at, each in enumerate(stores) for prefix in each.named.prefixes}
        self._first: tuple[NumSamples, list[Any]] | None = None

    def check_first(self, chunks: list[GPTModel]) -> list[GPTModel]:
        """Refuse stores that lack a unit before any model is loaded, as Megatron's pre-wrap hook.

        The datasets are built for it, and are what Megatron gets when it asks for them. Collectives: those of a call.

        Raises:
            ValueError: what `check_coverage` raises.
        """
        args = self._args
        # A stream lacks everything yet. In phases, only the checkpoint says which samples are read.
        if self._stream is None and not args.phase_transition_iterations:
            given = args.train_iters
            update_train_iters(args)  # from --train-samples
            num_samples = get_train_valid_test_num_samples()
            is_in_chunks = args.virtual_pipeline_model_parallel_size is not None
            self._first = num_samples, self(num_samples, vp_stage=0 if is_in_chunks else None)
            args.train_iters = given  # where it is set, Megatron schedules rates by it
        return chunks

    def __call__(self, num_samples: NumSamples, vp_stage: int | None = None) -> list[Any]:
        """Return the datasets of a chunk.

        Collectives for the first chunk: those of `check_coverage`, for each store; with a stream one all-gather over
        all ranks. None if they are built before.
        """
        if self._first is not None and not vp_stage:
            (numbers, first), self._first = self._first, None
            if numbers == tuple(num_samples):
                return first
        args, stream = self._args, self._stream
        place = Topology.from_megatron(sequence_parallel=args.sequence_parallel)
        found = list(self._provider(num_samples, vp_stage=vp_stage))
        if len(self._stores) > 1:
            found = [_each(part, partial(RoutedDataset, number_of=self._number_of)) for part in found]
        if not vp_stage and stream is None:  # the chunks of a stage read the same data
            self._look_up(found)
        features: list[Features] = [each.store for each in self._stores]
        asks: list[Asking | None] = [None] * len(found)
        if stream is not None:  # of the only teacher: `check_teachers`
            with together() if not vp_stage else nullcontext():
                features = [stream.open(place, sum(1 for each in _flat(found) if each is not None))]
            if not vp_stage:
                stream.join(place)
                asks = [stream.asking(number, count) for number, count in enumerate(num_samples)]
        reader = _reader(self._stores, features, place, vp_stage or 0, args.seq_length)
        return [
            _each(part, partial(_taught, reader=reader, ask=ask))
            for part, ask in zip(found, asks, strict=True)
        ]

    def _look_up(self, found: Sequence[Any]) -> None:
        """Refuse a store that lacks a unit of its datasets. Collectives: those of `check_coverage`, for each store."""
        sources = sources_of(found, self._args)
        for number, each in enumerate(self._stores):
            own = sources if len(self._stores) == 1 else picked(sources, self._number_of, number)
            check_coverage(own, each.named)


def _flat(found: Sequence[Any]) -> list[Any]:
    """Return the data sets of a provider, those of a list too."""
    return [each for part in found for each in (part if isinstance(part, list) else [part])]


def _each(part: Any, change: Callable[[Any], Any]) -> Any:
    """Change each dataset of a part of what a provider returned."""
    if isinstance(part, list):
        return [change(each) for each in part]
    return None if part is None else change(part)


def _taught(dataset: Dataset[Any], *, reader: Reader | None, ask: Asking | None) -> Dataset[Any]:
    return dataset if reader is None and ask is None else TaughtDataset(dataset, reader, ask)


def _reader(
    stores: Sequence[PlannedStore], features: Sequence[Features], place: Topology, chunk: int, length: int
) -> Reader | None:
    """Return what reads the features that a chunk of this rank needs; None if it needs none, of any teacher."""
    ranges, readers = read_ranges(length, place), []
    for each, source in zip(stores, features, strict=True):
        blocks = read_blocks(each.plan, each.plan.chunks_on(place.stage)[chunk], each.store)
        if not blocks:
            return None
        readers.append(FeatureReader(source, blocks, ranges))
    return readers[0] if len(readers) == 1 else RoutedReader(tuple(readers))
