"""An open store, from which ranges of tokens are read; every byte that is given out was compared with its sum."""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_fdd.data.store.identity import StoreIdentity, read_identity
from megatron_fdd.data.store.index import Index, Place, open_index, write_index
from megatron_fdd.data.store.segment import (
    REPAIR,
    SUM_TOKENS,
    Bytes,
    read_layout,
    segment_path,
    start_of,
    unreadable,
)
from megatron_fdd.data.store.unit import unit_key

# How many segments a process holds open.
_MOST_OPEN = 64

Ids = NDArray[np.int32]


class Store:
    """A store on disk. A copy in a forked process opens files of its own.

    Attributes:
        path: the folder.
        identity: what it holds.
        index: where each unit lies.
    """

    def __init__(self, path: Path, identity: StoreIdentity, index: Index) -> None:
        self.path, self.identity, self.index = path, identity, index
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()
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

    def read(self, ids: Ids, block_numbers: Sequence[int], first: int, last: int) -> Bytes:
        """Read the packed hidden states of a unit's tokens [first, last): uint8 [blocks, last - first, P].

        What `read_into` says.
        """
        found = np.empty((len(block_numbers), last - first, self.identity.token_bytes), np.uint8)
        self.read_into(ids, block_numbers, [(first, last, found)])
        return found

    def read_into(
        self, ids: Ids, block_numbers: Sequence[int], pieces: Sequence[tuple[int, int, Bytes]]
    ) -> None:
        """Read the packed hidden states of some ranges of a unit's tokens.

        Args:
            ids: the unit's ids, all of them; compared with those that are stored.
            block_numbers: which blocks, by their place in `identity.blocks`.
            pieces: first token, the one behind the last, and where the states go, uint8 [blocks, tokens, P].

        Raises:
            ValueError: the store lacks the unit, or what is read is not what was written.
        """
        place = self.index.find(unit_key(ids))
        if place is None:
            raise ValueError(
                f"{self.path}: has no unit of the {len(ids)} tokens {_shown(ids)}; run fdd teach with this run's data "
                "flags, which adds what is missing"
            )
        file = self._file(place.segment)
        layout = self.index.layouts[place.segment].tolist()
        num_blocks, width = len(self.identity.blocks), self.identity.token_bytes
        starts = [
            layout[2] + (place.start * num_blocks + number * place.length) * width for number in block_numbers
        ]
        for at in starts if len(pieces) > 1 else ():  # across gaps the system does not read ahead by itself
            for first, last, _ in pieces:
                os.posix_fadvise(file, at + first * width, (last - first) * width, os.POSIX_FADV_WILLNEED)
        if self._read(file, 4 * place.length, layout[1] + 4 * place.start, place) != ids.tobytes():
            raise self._damage(place, f"has other tokens under the key of {_shown(ids)}")
        num_sums = -(-place.length // SUM_TOKENS)
        stored = self._read(file, 8 * num_blocks * num_sums, layout[3] + 8 * place.sums, place)
        sums = struct.unpack(f"<{num_blocks * num_sums}Q", stored)
        for row, number in enumerate(block_numbers):
            own = sums[number * num_sums : (number + 1) * num_sums]
            for first, last, found in pieces:
                self._read_range(file, starts[row], (first, last), found[row], own, place)

    def _read_range(
        self,
        file: int,
        at: int,
        tokens: tuple[int, int],
        found: Bytes,
        sums: Sequence[int],
        place: Place,
    ) -> None:
        """Read a range of one block's tokens, and compare with the sums, which cover whole runs of 64 tokens.

        Args:
            at: where the block's states of this unit begin in the file.
            found: where they go, [tokens, P].
            sums: of the block's states of this unit.
        """
        first, last = tokens
        width = self.identity.token_bytes
        low, high = first // SUM_TOKENS * SUM_TOKENS, min(-(-last // SUM_TOKENS) * SUM_TOKENS, place.length)
        before, behind = bytearray((first - low) * width), bytearray((high - last) * width)
        inside = memoryview(found.reshape(-1).view(np.uint8))
        self._fill(
            file,
            [part for part in (memoryview(before), inside, memoryview(behind)) if part],
            at + low * width,
            place,
        )
        begin = 0
        for number in range(low // SUM_TOKENS, -(-high // SUM_TOKENS)):
            end = min((number + 1) * SUM_TOKENS - first, last - first) * width
            part = inside[begin:end]
            if (before and begin == 0) or (behind and end == len(inside)):
                part = memoryview(
                    b"".join((before if begin == 0 else b"", part, behind if end == len(inside) else b""))
                )
            if xxhash.xxh3_64_intdigest(part) != sums[number]:
                raise self._damage(place, "has other bytes than were written")
            begin = end

    def _read(self, file: int, size: int, at: int, place: Place) -> bytes:
        """Return bytes of a segment; raises what `_fill` raises."""
        try:
            found = os.pread(file, size, at)
        except OSError as error:
            raise unreadable(self._path(place.segment), error) from error
        if len(found) == size:
            return found
        rest = bytearray(size - len(found))
        self._fill(file, [memoryview(rest)], at + len(found), place)
        return found + rest

    def _fill(self, file: int, parts: list[memoryview], at: int, place: Place) -> None:
        """Fill some memory, part by part, with the bytes of a segment that begin at `at`.

        Raises:
            ValueError: there are fewer, or the disk does not give them.
        """
        while parts:  # the system gives at most 2 GiB at once
            try:
                count = os.preadv(file, parts, at)
            except OSError as error:
                raise unreadable(self._path(place.segment), error) from error
            if count == 0:
                raise self._damage(place, "is cut off")
            at += count
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][count:]

    def _damage(self, place: Place, what: str) -> ValueError:
        return ValueError(
            f"{self._path(place.segment)}: {what}: the disk or the copy is damaged; run {REPAIR}"
        )

    def _path(self, segment: int) -> Path:
        return segment_path(self.path, self.index.names[segment])

    def _file(self, segment: int) -> int:
        """Return the open file of a segment.

        Raises:
            ValueError: it is gone, has another size, or is of another store.
        """
        if self._owner != os.getpid():
            self._files, self._owner = OrderedDict(), os.getpid()
        if segment in self._files:
            self._files.move_to_end(segment)
            return self._files[segment]
        path = self._path(segment)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(path, error) from error
        size, wanted = os.fstat(file).st_size, int(self.index.layouts[segment, 0])
        if size != wanted:
            os.close(file)
            raise ValueError(f"{path}: has {size} bytes and had {wanted}; run {REPAIR}")
        # Ids and sums lie before the states.
        os.posix_fadvise(file, 0, int(self.index.layouts[segment, 2]), os.POSIX_FADV_WILLNEED)
        # An index's cache knows nothing of a file that came in the place of another one.
        if not os.pread(file, 8 + len(self._start), 0).endswith(self._start):
            os.close(file)
            read_layout(path, self.identity.digest)  # says of which other store or version it is
            raise ValueError(f"{path}: its header is not as fdd teach writes it; run {REPAIR}")
        self._files[segment] = file
        if len(self._files) > _MOST_OPEN:
            os.close(self._files.popitem(last=False)[1])
        return file


def _shown(ids: Ids) -> str:
    return f"{ids[:6].tolist()}{'...' if len(ids) > 6 else ''}"
