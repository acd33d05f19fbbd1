"""An open store, from which ranges of tokens are read; every byte that is given out was compared with its sum."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    def open(cls, path: str | Path, flag: str, *, skip: Sequence[str] = ()) -> Store:
        """Open the store in a folder.

        Args:
            flag: what named the folder, for messages.
            skip: names of segments to leave out.

        Raises:
            ValueError: there is no store, or a segment is damaged, cut off or foreign.
        """
        identity = read_identity(path, flag)
        index = open_index(Path(path), identity.digest, len(identity.blocks), skip=skip)
        return cls(Path(path), identity, index)

    def save_index(self) -> None:
        """Write the index's cache, with which the store opens at once. ValueError if the disk cannot take it."""
        write_index(self.path, self.identity.digest, self.index)

    def read(self, ids: NDArray[np.int32], block_numbers: Sequence[int], first: int, last: int) -> Bytes:
        """Read the packed hidden states of a unit's tokens [first, last): uint8 [blocks, last - first, P].

        Args:
            ids: the unit's ids, all of them; compared with those that are stored.
            block_numbers: which blocks, by their place in `identity.blocks`.

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
        self._check_ids(file, place, ids)
        # Whole blocks of sums: only these can be checked.
        low, high = first // SUM_TOKENS * SUM_TOKENS, min(-(-last // SUM_TOKENS) * SUM_TOKENS, place.length)
        sums = self._read_sums(file, place)
        width = self.identity.token_bytes
        states_at = int(self.index.layouts[place.segment, 2]) + place.start * len(sums) * width
        found = np.empty((len(block_numbers), high - low, width), np.uint8)
        for row, number in enumerate(block_numbers):
            self._fill(file, found[row], states_at + (number * place.length + low) * width, place)
            self._check_sums(found[row], sums[number, low // SUM_TOKENS :], place)
        return found[:, first - low : last - low]

    def _check_ids(self, file: int, place: Place, ids: NDArray[np.int32]) -> None:
        """Refuse a unit of other tokens."""
        stored = np.empty(place.length, np.int32)
        self._fill(file, stored, int(self.index.layouts[place.segment, 1]) + 4 * place.start, place)
        if not np.array_equal(stored, ids):
            raise self._damage(place, f"has other tokens under the key of {_shown(ids)}")

    def _read_sums(self, file: int, place: Place) -> NDArray[np.uint64]:
        """Read the sums of a unit, [T, ceil(S / 64)]."""
        shape = len(self.identity.blocks), -(-place.length // SUM_TOKENS)
        sums = np.empty(shape, np.uint64)
        self._fill(file, sums, int(self.index.layouts[place.segment, 3]) + 8 * place.sums, place)
        return sums

    def _fill(self, file: int, array: NDArray[Any], at: int, place: Place) -> None:
        """Read an array's bytes from those of a segment that begin at `at`.

        Raises:
            ValueError: there are fewer, or the disk does not give them.
        """
        rest = array.reshape(-1).view(np.uint8)
        while len(rest):  # the system gives at most 2 GiB at once
            try:
                count = os.preadv(file, [rest.data], at)
            except OSError as error:
                raise unreadable(self._path(place.segment), error) from error
            if count == 0:
                raise self._damage(place, "is cut off")
            rest, at = rest[count:], at + count

    def _check_sums(self, states: Bytes, sums: NDArray[np.uint64], place: Place) -> None:
        """Refuse bytes [S, P] that are not those that were written."""
        for number, first in enumerate(range(0, len(states), SUM_TOKENS)):
            if xxhash.xxh3_64_intdigest(states[first : first + SUM_TOKENS]) != int(sums[number]):
                raise self._damage(place, "has other bytes than were written")

    def _damage(self, place: Place, what: str) -> ValueError:
        return ValueError(f"{self._path(place.segment)}: {what}: the disk or the copy is damaged; {REPAIR}")

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
            raise ValueError(f"{path}: has {size} bytes and had {wanted}; {REPAIR}")
        # An index's cache knows nothing of a file that came in the place of another one.
        if not os.pread(file, 8 + len(self._start), 0).endswith(self._start):
            os.close(file)
            read_layout(path, self.identity.digest)  # says of which other store or version it is
            raise ValueError(f"{path}: its header is not as fdd teach writes it; {REPAIR}")
        self._files[segment] = file
        if len(self._files) > _MOST_OPEN:
            os.close(self._files.popitem(last=False)[1])
        return file


def _shown(ids: NDArray[np.int32]) -> str:
    return f"{ids[:6].tolist()}{'...' if len(ids) > 6 else ''}"
