"""The asker: the first rank of a replica asks for its micro-batches ahead of its loaders, and removes what was used.

All of its state is in one thread; the training's thread hands it events.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_fdd.data.store.identity import StoreIdentity
from megatron_fdd.data.store.segment import segment_bytes
from megatron_fdd.data.store.store import Ids
from megatron_fdd.data.stream.ask import Ask
from megatron_fdd.data.stream.folder import ReplicaFolder, replicas
from megatron_fdd.data.stream.sign import Sign, Watch, changing

# Seconds between two looks for what is there and should not be, and the other way round.
_LOOK_S = 2.0
# A file that a producer writes changes more often.
_ABANDONED_S = 600.0
# How long the end of a run waits for the thread.
_PATIENCE_S = 10.0
# Places between two micro-batches of the training, for those of validations.
_PLACES = 1000
# More than the header of a segment has.
_HEADER_BYTES = 1024


@dataclass(slots=True)
class _Source:
    """The micro-batches of one loader, in its order.

    Attributes:
        units: of each, from where the loader begins.
        most: asks that are not done yet; None for the training's, which are as many as there is room for.
        num_taken: how many the loader has given out; the training's thread counts.
        num_ended: how many of those were in steps that have ended.
        waiting: asks that are not done.
        next: read and not asked for, for want of room.
    """

    units: Iterator[Sequence[Ids]]
    most: int | None
    num_taken: int = 0
    num_ended: int = 0
    num_done: int = 0
    waiting: deque[Ask] = field(default_factory=deque)
    num_bytes: int = 0
    next: Ask | None = None


class _TakenLoader:
    """A loader that counts what it gives out."""

    def __init__(self, loader: Any, source: _Source) -> None:
        self._loader, self._source = loader, source

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self._source.num_taken += 1
            yield batch


class Asker:
    """The asks of one replica.

    The training's asks fill the room; those of a validation or test are a few, and go first. What a step has used is
    removed when the step has ended; the training's first of that stay until the next checkpoint, while they take at
    most half of the room, so that a training which resumes finds them.

    Args:
        room: bytes that asks and answers may take together.
        keeps: whether checkpoints are written.
    """

    def __init__(self, folder: ReplicaFolder, identity: StoreIdentity, room: int, *, keeps: bool) -> None:
        self._folder, self._identity = folder, identity
        self._room, self._least, self._keeps = room, 0, keeps
        self._sources: list[_Source] = []
        self._needed: Counter[str] = Counter()
        self._kept: deque[tuple[int, Ask]] = deque()
        self._kept_bytes = 0
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._watch = Watch()
        self._sign = Sign(folder.student, state="running")

    def follow(
        self, loader: Any, units: Iterable[Sequence[Ids]], *, most: int | None, num_bytes: int
    ) -> _TakenLoader:
        """Ask for the micro-batches of a loader from now on; return the loader to use.

        Args:
            units: of its micro-batches, in its order.
            most: how many are asked for ahead; None, for the training's: as many as there is room for.
            num_bytes: what those take, at most; for the training's, what it needs at least.
        """
        source = _Source(iter(units), most)
        self._sources.append(source)
        if most is None:
            self._least = num_bytes
        else:
            self._room -= num_bytes
        return _TakenLoader(loader, source)

    def step_ended(self) -> None:
        """Note that a step, or one of a validation, has ended on this rank.

        What the loaders gave out is done when the device has ended the step: then all ranks of the replica have read.

        Raises:
            ValueError: asking has failed.
        """
        if self._failure is not None:
            raise ValueError(str(self._failure)) from self._failure
        wait: Callable[[], object] = _nothing
        if torch.cuda.is_available():
            event = torch.cuda.Event()
            event.record()
            wait = event.synchronize
        counts = [source.num_taken for source in self._sources]
        self._events.put(partial(self._end_step, counts, wait))

    def save(self) -> Callable[[], None]:
        """Note that a checkpoint is begun; return what is to be called when it is whole."""
        counts = [source.num_taken for source in self._sources]
        return lambda: self._events.put(partial(self._drop_kept, counts))

    def begin(self) -> None:
        """Begin to ask, if that has not begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def end(self, *, is_over: bool) -> None:
        """End the asking.

        Args:
            is_over: whether the training is complete, so that producers may end and nothing is needed any more.
        """
        if self._thread is not None:
            self._events.put(None)
            self._thread.join(_PATIENCE_S)  # it may wait for a device that has failed
        if is_over:
            self._folder.clear()
        self._sign.close(state="ended" if is_over else "stopped")

    def _work(self) -> None:
        try:
            asks = self._ahead()
            self._folder.clear(self._needed)  # what another run has left, and this one does not ask for
            self._write(asks)
            looked_s = time.monotonic()
            while True:
                with contextlib.suppress(queue.Empty):
                    event = self._events.get(timeout=_LOOK_S)
                    if event is None:
                        return
                    event()
                self._write(self._ahead())
                if time.monotonic() - looked_s >= _LOOK_S:
                    self._tidy()
                    looked_s = time.monotonic()
        except Exception as error:  # all ranks are told, who would wait for answers
            self._failure = error
            self._sign.tell(failure=f"asking the producers has failed: {error}")

    def _ahead(self) -> list[Ask]:
        """Return what can be asked for now."""
        found = []
        self._retire()
        for source in self._sources:
            while (ask := self._read(source)) is not None:
                size = self._size(ask)
                if source.most is None:
                    if source.num_bytes + self._kept_bytes + size > self._room:
                        break
                elif len(source.waiting) >= source.most:
                    break
                source.next = None
                source.waiting.append(ask)
                source.num_bytes += size
                self._needed[ask.name] += 1
                found.append(ask)
                self._retire()
        return found

    def _read(self, source: _Source) -> Ask | None:
        """Return the source's next ask; None if it has no more."""
        if source.next is None and (units := next(source.units, None)) is not None:
            training = next((each for each in self._sources if each.most is None), source)
            number = source.num_done + len(source.waiting)
            place = number * _PLACES
            if source is not training:  # needed next, whenever that is
                place = training.num_done * _PLACES + number % _PLACES
            source.next = Ask.of(place, units)
        return source.next

    def _write(self, asks: Iterable[Ask]) -> None:
        for ask in asks:
            if ask.units and not self._folder.segment(ask.name).exists():
                self._folder.write_ask(ask.place, ask.name, ask.content())

    def _end_step(self, counts: Sequence[int], wait: Callable[[], object]) -> None:
        wait()
        for source, count in zip(self._sources, counts, strict=True):
            source.num_ended = count
        self._retire()

    def _retire(self) -> None:
        """Remove what was used in steps that have ended; keep some of the training's."""
        for source in self._sources:
            while source.waiting and source.num_done < source.num_ended:
                ask, source.num_done = source.waiting.popleft(), source.num_done + 1
                size = self._size(ask)
                source.num_bytes -= size
                room = min(self._room // 2, self._room - self._least) if self._keeps else 0
                if source.most is None and self._kept_bytes + size <= room:
                    self._kept.append((source.num_done, ask))
                    self._kept_bytes += size
                else:
                    self._release(ask)

    def _drop_kept(self, counts: Sequence[int]) -> None:
        """Remove what was kept for a resume, up to what a checkpoint has."""
        for source, count in zip(self._sources, counts, strict=True):
            while source.most is None and self._kept and self._kept[0][0] <= count:
                _, ask = self._kept.popleft()
                self._kept_bytes -= self._size(ask)
                self._release(ask)

    def _release(self, ask: Ask) -> None:
        self._needed[ask.name] -= 1
        if not self._needed[ask.name]:
            del self._needed[ask.name]
            self._folder.segment(ask.name).unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Remove what nobody needs: late answers, and what killed producers left. Ask again for what has got lost."""
        there = self._folder.listing()
        for name, place in there.asks.items():
            if name not in self._needed:
                self._folder.ask(place, name).unlink(missing_ok=True)
        for paths, of in ((there.claims, self._folder.claim), (there.segments, self._folder.segment)):
            for name in paths - self._needed.keys():
                of(name).unlink(missing_ok=True)
        unfinished = self._folder.unfinished()
        self._watch.forget_others(unfinished)
        for path in unfinished:
            with contextlib.suppress(FileNotFoundError):
                if self._watch.unchanged_s(path, path.stat().st_size) >= _ABANDONED_S:
                    path.unlink()
        for source in self._sources:
            lost = [ask for ask in source.waiting if ask.name not in there.segments | there.asks.keys()]
            self._write(lost)  # a producer has answered those whose files are there by now

    def _size(self, ask: Ask) -> int:
        return bytes_of(self._identity, [len(ids) for ids in ask.units])


def check_alone(store: Path) -> None:
    """Refuse a stream that another training follows: a sign of life of one of its replicas changes."""
    found = changing(folder.student for folder in replicas(store))
    if found is not None:
        raise ValueError(
            f"--fdd-teacher-store {store}: another training follows this stream ({found} changes); end it, or give "
            "each training a store of its own"
        )


def bytes_of(identity: StoreIdentity, lengths: Sequence[int]) -> int:
    """Return at most how many bytes the answer with units of these lengths has."""
    return _HEADER_BYTES + segment_bytes(
        np.array(lengths, np.int64), len(identity.blocks), identity.token_bytes
    )


def _nothing() -> None:
    """Wait for no device."""
