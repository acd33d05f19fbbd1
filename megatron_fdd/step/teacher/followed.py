"""The stream that a training follows, on one rank: where its features come from, and who asks for them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from megatron_fdd.config import FddConfig
from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.identity import StoreIdentity
from megatron_fdd.data.store.loader import micro_batches, read_ahead
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.taught import Asking
from megatron_fdd.data.store.unit import as_ids, units_of_rows
from megatron_fdd.data.stream.asker import Asker, bytes_of, check_alone
from megatron_fdd.data.stream.features import StreamFeatures
from megatron_fdd.data.stream.folder import ReplicaFolder, replicas, window_bytes
from megatron_fdd.host.topology import Topology


class FollowedStream:
    """The stream of a run."""

    def __init__(self, store: Store, args: argparse.Namespace, config: FddConfig) -> None:
        self._store, self._args, self._wait_s = store, args, config.teacher_wait
        # Micro-batches of a data set that are read ahead or in use.
        self._each = read_ahead(args, whole_steps=config.tokens == "all") + micro_batches(args)
        self._features: StreamFeatures | None = None
        self._asker: Asker | None = None

    @classmethod
    def of(cls, store: Store | None, args: argparse.Namespace, config: FddConfig) -> FollowedStream | None:
        """Return the stream of a run; None if it follows none."""
        return cls(store, args, config) if store is not None and config.teacher_follow else None

    def open(self, place: Topology, num_sets: int) -> StreamFeatures:
        """Return this replica's features; the first rank of all looks whether another training follows the stream.

        Nothing is written or removed: `join` does, when no rank has refused.

        Args:
            num_sets: data sets that the run reads.

        Collectives: none.

        Raises:
            ValueError: the window is too small for what the loaders read ahead, or another training follows the stream.
        """
        replica, count = place.collection.dp.rank(), place.collection.dp.size()
        window, need = self._window(), num_sets * self._bytes()
        if window // count < need:
            raise ValueError(
                f"--fdd-teacher-store {self._store.path}: its window of {window} bytes is too small: {count} data-"
                f"parallel replica(s) with {num_sets} data set(s) need {count * need} for what their loaders read "
                f"ahead ({self._each} micro-batches a set); start a new stream with fdd teach --follow --window-bytes "
                f"{count * need} or more, or give fewer --num-workers"
            )
        if replica == 0 and _is_first(place) and self._asker is None:
            check_alone(self._store.path)
        if self._features is None:
            folder = ReplicaFolder(self._store.path, replica)
            self._features = StreamFeatures(folder, self._store.identity, self._wait_s)
        return self._features

    def join(self, place: Topology) -> None:
        """Begin to give a sign of life, on this replica's first rank; replicas that are no more lose what they have.

        Collectives: none.
        """
        if not _is_first(place) or self._asker is not None:
            return
        replica, count = place.collection.dp.rank(), place.collection.dp.size()
        if replica == 0:
            for former in replicas(self._store.path):
                if former.replica >= count:
                    former.clear()
                    former.student.unlink(missing_ok=True)
        folder, keeps = ReplicaFolder(self._store.path, replica), self._args.save is not None
        self._asker = Asker(folder, self._store.identity, self._window() // count, keeps=keeps)

    def asking(self, number: int, num_samples: int | None) -> Asking | None:
        """Return what asks for the features of a data set; None on a rank that does not ask.

        Args:
            number: 0 for the training's.
            num_samples: how many the run reads; None: of a validation all, each time.
        """
        if self._asker is None:
            return None
        return partial(self._ask, is_training=number == 0, num_samples=num_samples)

    def begin(self) -> None:
        """Begin to ask, where that has not begun: the loaders' processes are there by now."""
        if self._asker is not None:
            self._asker.begin()

    def step_ended(self) -> None:
        """Note that a step has ended on this rank. Raises what `Asker.step_ended` raises."""
        if self._asker is not None:
            self._asker.step_ended()

    def save(self) -> Callable[[], None]:
        """Note that a checkpoint is begun; return what is to be called when it is whole."""
        return (lambda: None) if self._asker is None else self._asker.save()

    def end(self, *, is_over: bool) -> None:
        """End asking and waiting; `is_over`: whether the training is complete."""
        if self._features is not None:
            self._features.end()
        if self._asker is not None:
            self._asker.end(is_over=is_over)

    def _ask(
        self,
        loader: Any,
        batches: Iterable[Mapping[str, Tensor]],
        num_consumed: int,
        *,
        is_training: bool,
        num_samples: int | None,
    ) -> Any:
        assert self._asker is not None
        left = None if num_samples is None else num_samples - num_consumed
        units = _units_of(batches, left, self._args.data_parallel_size)
        most = None if is_training else self._each
        return self._asker.follow(loader, units, most=most, num_bytes=self._bytes())

    def _window(self) -> int:
        """Return the bytes of the window."""
        window = window_bytes(self._store.path)
        assert window is not None, "check_stream"
        return window

    def _bytes(self) -> int:
        """Return what the micro-batches of a data set take at most that are read ahead or used at once."""
        args = self._args
        rows = max(args.micro_batch_size, getattr(args, "eval_micro_batch_size", None) or 0)
        return self._each * largest_bytes(self._store.identity, rows * args.seq_length)


def _is_first(place: Topology) -> bool:
    """Whether this is the first rank of its data-parallel replica."""
    return place.tensor_rank == place.stage == place.context_group.rank() == 0


def largest_bytes(identity: StoreIdentity, num_tokens: int) -> int:
    """Return what a micro-batch of so many tokens takes at most: each may be a unit."""
    return bytes_of(identity, [1] * num_tokens)


def _units_of(
    batches: Iterable[Mapping[str, Tensor]], num_samples: int | None, num_replicas: int
) -> Iterator[list[Ids]]:
    """Yield the ids of each batch's units.

    Args:
        num_samples: how many samples all replicas together still read; None: no end.
    """
    for batch in batches:
        if num_samples is not None:
            if num_samples <= 0:
                return
            num_samples -= len(batch["tokens"]) * num_replicas
        rows = zip(as_ids(batch["tokens"].numpy()), units_of_rows(batch), strict=True)
        yield [tokens[first:last] for tokens, units in rows for first, last in units]
