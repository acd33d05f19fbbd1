"""An open segment of a store: ranges of its states go where the caller wants them, each compared with its sums."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from megatron_fdd.data.store.index import INDEX_FILE
from megatron_fdd.data.store.segment import REPAIR, SUM_TOKENS, read_layout, unreadable

# Bytes that are read by one call and then compared, while they are still in the processor's cache.
AT_ONCE = 1 << 20
# Places that one call fills; the system takes 1,024.
_MOST_PARTS = 512


class Range(NamedTuple):
    """Some whole runs of 64 tokens, the last one perhaps shorter.

    Attributes:
        at: their first byte in the file.
        into: where they go.
        sums: of the runs.
        copies: where a part of `into` goes once it is compared, and that part; for a range that begins or ends within
            a run.
    """

    at: int
    into: memoryview
    sums: tuple[int, ...]
    copies: tuple[memoryview, memoryview] | None = None


def ranges_of(
    at: int, tokens: tuple[int, int], length: int, into: memoryview, sums: tuple[int, ...]
) -> list[Range]:
    """Cut a range of one block's tokens into what one call reads.

    Args:
        at: where the block's states of the unit begin in the file.
        tokens: the first, and the one behind the last.
        length: tokens of the unit.
        into: where they go.
        sums: of the block's states of the unit.
    """
    begin, last = tokens
    width = len(into) // (last - begin)
    ends_with_a_run = last == length or last % SUM_TOKENS == 0
    if ends_with_a_run and begin % SUM_TOKENS == 0 and len(into) <= AT_ONCE:  # most of them
        return [Range(at + begin * width, into, sums[begin // SUM_TOKENS : -(-last // SUM_TOKENS)])]
    ranges, most = [], max(1, AT_ONCE // (SUM_TOKENS * width))
    while begin < last:
        run, offset = divmod(begin, SUM_TOKENS)
        whole = min(begin - offset + SUM_TOKENS, length)
        if offset or whole > last:
            start, stop = begin - offset, min(whole, last)
            beside = memoryview(bytearray((whole - start) * width))
            wanted = beside[offset * width : (stop - start) * width]
            copies = into[: len(wanted)], wanted
            ranges.append(Range(at + start * width, beside, sums[run : run + 1], copies))
        else:
            end = last if last == length else last // SUM_TOKENS * SUM_TOKENS
            stop = min(begin + most * SUM_TOKENS, end)
            runs = sums[run : -(-stop // SUM_TOKENS)]
            ranges.append(Range(at + begin * width, into[: (stop - begin) * width], runs))
        into = into[(stop - begin) * width :]
        begin = stop
    return ranges


class SegmentFile:
    """An open segment.

    Attributes:
        ids, states, sums: first bytes of these tensors in the file.
    """

    __slots__ = ("_descriptor", "_path", "ids", "states", "sums")

    def __init__(self, path: Path, layout: Sequence[int], start: bytes, digest: str) -> None:
        """Open a segment.

        Args:
            layout: its row of `Index.layouts`.
            start: the beginning of the header, behind its length.
            digest: of the store's identity.

        Raises:
            ValueError: it is gone, cut off, of another store, or another one than the index knows.
        """
        self._path, self._descriptor = path, -1
        wanted, self.ids, self.states, self.sums = layout[:4]
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
        except OSError as error:
            raise unreadable(path, error) from error
        # An index's cache knows nothing of a file that came in the place of another one. Its own header says if it is
        # cut off, or of which other store or version it is.
        is_as_written = os.fstat(self._descriptor).st_size == wanted
        if not (is_as_written and self.read(8 + len(start), 0).endswith(start)):
            found = read_layout(path, digest)
            if (found.size, found.ids[0], found.states[0], found.sums[0]) != tuple(layout[:4]):
                raise ValueError(
                    f"{path}: was exchanged since {INDEX_FILE} was written; remove {INDEX_FILE}, which is made anew "
                    "from the segments, and start again"
                )

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def announce(self, at: int, size: int) -> None:
        """Tell the system what will be read."""
        os.posix_fadvise(self._descriptor, at, size, os.POSIX_FADV_WILLNEED)

    def is_in_memory(self, at: int) -> bool:
        """Return whether the system has a byte in its cache; not where it cannot say."""
        try:
            return os.preadv(self._descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1
        except OSError:
            return False

    def read(self, size: int, at: int) -> bytes:
        """Return some bytes.

        Raises:
            ValueError: there are fewer, or the disk does not give them.
        """
        try:
            found = os.pread(self._descriptor, size, at)
        except OSError as error:
            raise unreadable(self._path, error) from error
        if len(found) == size:
            return found
        rest = bytearray(size - len(found))
        self._fill([memoryview(rest)], at + len(found))
        return found + rest

    def read_ranges(self, ranges: Sequence[Range], run_bytes: int) -> None:
        """Read states to their places; what is adjacent in the file by one call.

        Args:
            run_bytes: of 64 tokens.

        Raises:
            ValueError: what is read is not what was written.
        """
        together: list[Range] = []
        size = end = 0
        for each in ranges:
            count = len(each.into)
            if each.at != end or size + count > AT_ONCE or len(together) == _MOST_PARTS:
                self._read_together(together, run_bytes)
                together, size = [], 0
            together.append(each)
            size, end = size + count, each.at + count
        self._read_together(together, run_bytes)

    def damage(self, what: str) -> ValueError:
        """Return the error of a damaged file."""
        return ValueError(f"{self._path}: {what}: the disk or the copy is damaged; run {REPAIR}")

    def _read_together(self, ranges: Sequence[Range], run_bytes: int) -> None:
        if not ranges:
            return
        self._fill([each.into for each in ranges], ranges[0].at)
        digest = xxhash.xxh3_64_intdigest
        for _, into, sums, copies in ranges:
            if tuple([digest(into[at : at + run_bytes]) for at in range(0, len(into), run_bytes)]) != sums:
                raise self.damage("has other bytes than were written")
            if copies is not None:
                copies[0][:] = copies[1]

    def _fill(self, parts: list[memoryview], at: int) -> None:
        """Fill some memory, part by part, with the bytes that begin at `at`; raises what `read` raises."""
        while parts:  # the system gives at most 2 GiB at once
            try:
                count = os.preadv(self._descriptor, parts, at)
            except OSError as error:
                raise unreadable(self._path, error) from error
            if count == 0:
                raise self.damage("is cut off")
            at += count
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][count:]
