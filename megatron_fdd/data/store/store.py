"""An open store, from which ranges of tokens are read; every byte that is given out was compared with its sum."""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_fdd.data.store.identity import RUNS, StoreIdentity, read_identity
from megatron_fdd.data.store.index import Index, Place, open_index, write_index
from megatron_fdd.data.store.segment import SUM_TOKENS, Bytes, segment_path, start_of
from megatron_fdd.data.store.segment_file import AT_ONCE, Range, SegmentFile, ranges_of
from megatron_fdd.data.store.unit import unit_key

# How many segments a thread holds open.
_MOST_OPEN = 64
# Threads that read the units of a micro-batch: while one compares, another one reads.
_READERS = 2
# How many segments are opened at once, to look at them.
_THREADS = 16

Ids = NDArray[np.int32]


class Wanted(NamedTuple):
    """What is to be read of a unit.

    Attributes:
        ids: all of them.
        pieces: ranges of tokens: the first, the one behind the last, and for each block where the states go.
    """

    ids: Ids
    pieces: Sequence[tuple[int, int, Sequence[memoryview]]]


class _Open(threading.local):
    """The open segments of one thread of one process, the one that was used last at the end."""

    def __init__(self) -> None:
        self.files: OrderedDict[int, SegmentFile] = OrderedDict()
        self.owner = os.getpid()


class _Readers:
    """Threads that work beside the one that asks; a forked process makes its own."""

    def __init__(self) -> None:
        self._threads, self._owner = ThreadPoolExecutor(_READERS - 1), os.getpid()

    def each(self, work: Callable[[int], None], count: int) -> None:
        """Call `work` with each number below `count` at the same time, 0 in this thread; raises what a call raises."""
        if self._owner != os.getpid():
            self._threads, self._owner = ThreadPoolExecutor(_READERS - 1), os.getpid()
        others = [self._threads.submit(work, number) for number in range(1, count)]
        try:
            work(0)
        finally:
            wait(others)
        for each in others:
            each.result()


class Store:
    """A store on disk. Each thread, and a copy in a forked process, opens files of its own.

    Attributes:
        path: the folder.
        identity: what it holds.
        index: where each unit lies.

    Args:
        place: from the folder and a segment's name to the file.
    """

    def __init__(
        self,
        path: Path,
        identity: StoreIdentity,
        index: Index,
        place: Callable[[Path, str], Path] = segment_path,
    ) -> None:
        self.path, self.identity, self.index = path, identity, index
        self._place, self._open, self._readers = place, _Open(), _Readers()
        self._start = start_of(identity.digest)

    @classmethod
    def open(cls, path: str | Path, flag: str) -> Store:
        """Open the store in a folder.

        Args:
            flag: what named the folder, for messages.

        Raises:
            ValueError: there is no store, or a segment is damaged, cut off or foreign.
        """
        identity = read_identity(path, flag)
        index = open_index(Path(path), identity.digest, len(identity.blocks))
        return cls(Path(path), identity, index)

    def save_index(self) -> None:
        """Write the index's cache, with which the store opens at once. ValueError if the disk cannot take it."""
        write_index(self.path, self.identity.digest, self.index)

    def check_segments(self) -> None:
        """Refuse a segment that changed behind the index's cache: each is opened, and its size and header compared.

        Raises:
            ValueError: it is gone, of another size, or of another store or version.
        """
        with ThreadPoolExecutor(_THREADS) as threads:
            for _ in threads.map(self._opened, range(len(self.index.names))):
                pass

    def read(self, ids: Ids, block_numbers: Sequence[int], first: int, last: int) -> Bytes:
        """Read the packed hidden states of a unit's tokens [first, last): uint8 [blocks, last - first, P].

        What `read_into` says.
        """
        found = np.empty((len(block_numbers), last - first, self.identity.token_bytes), np.uint8)
        rows = [memoryview(row.reshape(-1)) for row in found]
        self.read_into(block_numbers, [Wanted(ids, [(first, last, rows)])])
        return found

    def read_into(self, block_numbers: Sequence[int], units: Sequence[Wanted]) -> None:
        """Read the packed hidden states of some ranges of some units' tokens.

        All units are looked up before the first is read, and their ids compared with those that are stored.

        Args:
            block_numbers: which blocks, by their place in `identity.blocks`.
            units: one without pieces is not looked up.

        Raises:
            ValueError: the store lacks a unit, or what is read is not what was written.
        """
        wanted = [unit for unit in units if unit.pieces]
        places = self.index.find_all([unit_key(unit.ids) for unit in wanted])
        found = []
        for unit, place in zip(wanted, places, strict=True):
            if place is None:
                raise ValueError(
                    f"{self.path}: has no unit of the {len(unit.ids)} tokens {_shown(unit.ids)}; run fdd teach with "
                    f"this run's data flags, which adds what is missing; if that finds nothing, a file of the data was "
                    f"changed and kept its time: remove {self.path / RUNS} first"
                )
            file = self._file(place.segment)
            found.append((file, self._ranges(file, block_numbers, unit, place)))
        run_bytes = SUM_TOKENS * self.identity.token_bytes

        def read_share(number: int) -> None:
            for file, ranges in found[number::_READERS]:
                file.read_ranges(ranges, run_bytes)

        self._readers.each(read_share, min(_READERS, len(found)))

    def _ranges(
        self, file: SegmentFile, block_numbers: Sequence[int], unit: Wanted, place: Place
    ) -> list[Range]:
        """Return what is to be read of a unit, with its sums. ValueError if its ids are others."""
        num_blocks, width, length = len(self.identity.blocks), self.identity.token_bytes, place.length
        states = file.states + place.start * num_blocks * width
        starts = [states + number * length * width for number in block_numbers]
        # Across gaps the system does not read ahead by itself, nor enough of one block's long range, which comes in
        # pieces. From memory, announcing would take a third of the time.
        is_long = len(starts) == 1 and any((last - first) * width > AT_ONCE for first, last, _ in unit.pieces)
        if (len(unit.pieces) > 1 or is_long) and not file.is_in_memory(
            starts[-1] + unit.pieces[-1][0] * width
        ):
            for at in starts:
                for first, last, _ in unit.pieces:
                    file.announce(at + first * width, (last - first) * width)
        if file.read(4 * length, file.ids + 4 * place.start) != unit.ids.tobytes():
            raise file.damage(f"has other tokens under the key of {_shown(unit.ids)}")
        num_sums = -(-length // SUM_TOKENS)
        stored = file.read(8 * num_blocks * num_sums, file.sums + 8 * place.sums)
        sums = struct.unpack(f"<{num_blocks * num_sums}Q", stored)
        ranges: list[Range] = []
        for row, number in enumerate(block_numbers):
            own = sums[number * num_sums : (number + 1) * num_sums]
            for first, last, rows in unit.pieces:
                ranges += ranges_of(starts[row], (first, last), length, rows[row], own)
        return ranges

    def _file(self, segment: int) -> SegmentFile:
        """Return an open segment; raises what `SegmentFile` raises."""
        if self._open.owner != os.getpid():
            self._open.files, self._open.owner = OrderedDict(), os.getpid()
        files = self._open.files
        if segment in files:
            files.move_to_end(segment)
            return files[segment]
        file = files[segment] = self._opened(segment)
        file.announce(0, file.states)  # ids and sums
        if len(files) > _MOST_OPEN:
            files.popitem(last=False)
        return file

    def _opened(self, segment: int) -> SegmentFile:
        path, layout = self._place(self.path, self.index.names[segment]), self.index.layouts[segment]
        return SegmentFile(path, layout.tolist(), self._start, self.identity.digest)


def _shown(ids: Ids) -> str:
    return f"{ids[:6].tolist()}{'...' if len(ids) > 6 else ''}"
