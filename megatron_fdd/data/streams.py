"""Files and pipes as bytes: decompressed, recognised by their first bytes rather than by their names, read once."""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from collections.abc import Buffer, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, BinaryIO, Literal

from megatron_fdd.host.pipe import open_to_read

Compression = Literal["gzip", "zstd"]
# So much of a file is read to tell its format; its first record should be inside.
HEAD_BYTES = 4 * 1024 * 1024
# Enough to recognise what is not text.
START_BYTES = 4096
_BUFFER_BYTES = 1024 * 1024
_DISK_BYTES = 64 * 1024
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
# Compression makes JSON and text three times smaller, or more.
_PACKED_TIMES = 3
_UTF8_MARK = b"\xef\xbb\xbf"
# Formats that are not text, and what to do about them.
_REFUSED: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(rb"ARROW1|\xff{4}"),
        "an Arrow file, as datasets' save_to_disk makes: write it with to_parquet",
    ),
    (
        re.compile(rb"PK\x03\x04|7z\xbc\xaf|.{257}ustar", re.DOTALL),
        "an archive: unpack it and give its files",
    ),
    (
        re.compile(rb"BZh\d1AY&SY|\xfd7zXZ\0"),
        "compressed with bzip2 or xz, which are not read: use gzip or zstd",
    ),
    (
        re.compile(rb"\x1f\x8b|\x28\xb5\x2f\xfd|PAR1"),
        "compressed twice, or parquet in a compressed file: decompress it",
    ),
    (
        re.compile(rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff"),
        "UTF-16 or UTF-32: convert it to UTF-8 (iconv -t UTF-8)",
    ),
)


class Stream:
    """The bytes of a file from its beginning, decompressed, without a byte order mark.

    Attributes:
        bytes: a reader of what is left.
        is_parquet: true for a parquet file, which is read by its path, not from here.
    """

    def __init__(self, path: str, file: BinaryIO) -> None:
        """Start at the beginning of `file`, and close it in the end.

        Raises:
            ValueError: the file is compressed with zstd, and pyarrow is not installed.
        """
        self.path = path
        self._disk = self._begun = _Begun(file)
        self._taken = 0
        magic = self._disk.head(4)
        self.is_parquet = magic == _PARQUET
        self._is_compressed = magic[:2] == _GZIP or magic == _ZSTD
        if self._is_compressed:
            compressed = io.BufferedReader(self._disk, _DISK_BYTES)
            self._begun = _Begun(_decompressed(path, compressed, "gzip" if magic[:2] == _GZIP else "zstd"))
        has_mark = self._begun.head(3) == _UTF8_MARK
        self._mark_bytes = self._begun.skip(3) if has_mark else 0
        self.bytes = io.BufferedReader(self._begun, _BUFFER_BYTES)

    def head(self, num_bytes: int) -> tuple[bytes, bool]:
        """Return the first bytes, and whether they are the whole file. They can still be read afterwards.

        Call it before anything is read.

        Args:
            num_bytes: so many bytes, or fewer at the end of the file; a pipe is waited for.

        Raises:
            ValueError: the bytes show that the file is not text.
        """
        head = self._begun.head(num_bytes)
        for pattern, remedy in _REFUSED:
            if pattern.match(head):
                raise ValueError(f"{self.path} is {remedy}; only UTF-8 text, JSON and parquet are read")
        return head, len(head) < num_bytes

    def share(self, num_bytes: int) -> int:
        """Return how many bytes of the file on disk were used for the next `num_bytes`.

        In a compressed file, compressed bytes count when they are read.
        """
        if self._is_compressed:
            before, self._taken = self._taken, self._disk.count
            return self._taken - before
        num_bytes, self._mark_bytes = num_bytes + self._mark_bytes, 0
        return num_bytes

    def close(self) -> None:
        """Close the file."""
        self.bytes.close()
        self._disk.close()  # the decompressors leave it open


def about_bytes(path: str) -> int:
    """Estimate how much text or JSON a file holds: its size, times 3 if it is compressed or parquet."""
    with open(path, "rb") as file:
        magic = file.read(4)
    is_packed = magic[:2] == _GZIP or magic in (_ZSTD, _PARQUET)
    return os.path.getsize(path) * (_PACKED_TIMES if is_packed else 1)


# A pipe cannot be opened twice: after `look`, its stream waits here for its reader.
_looked_at: dict[str, Stream] = {}


@contextmanager
def open_stream(path: str) -> Iterator[Stream]:
    """Open the stream of a file, and close it in the end.

    Raises:
        ValueError: as in `Stream` and `open_to_read`.
        OSError: the file cannot be opened.
    """
    stream = _looked_at.pop(path, None) or Stream(path, open_to_read(path))
    try:
        yield stream
    finally:
        stream.close()


@contextmanager
def look(path: str) -> Iterator[Stream]:
    """Open a stream to read only its head; the stream of a pipe stays open for its reader."""
    stream = _looked_at.pop(path, None) or Stream(path, open_to_read(path))
    try:
        yield stream
    finally:
        if os.path.isfile(path):
            stream.close()
        else:
            _looked_at[path] = stream


def pyarrow_for(path: str, kind: str) -> ModuleType:
    """Import pyarrow where it is first needed, and return it.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path}: {kind} needs pyarrow: pip install 'megatron_fdd[parquet]'") from error
    return pyarrow


class _Begun(io.RawIOBase):
    """A file whose beginning can be looked at before it is read; a pipe gives what it has without waiting.

    Attributes:
        count: how many bytes were read from the file.
    """

    def __init__(self, file: Any) -> None:
        """Start with `file`, which has `readinto` and `close`."""
        self._file = file
        self._kept = bytearray()
        self.count = 0

    def head(self, num_bytes: int) -> bytes:
        """Return the next bytes, which stay to be read; fewer at the end."""
        while (missing := num_bytes - len(self._kept)) > 0:
            buffer = bytearray(missing)
            count = self._file.readinto(buffer)
            if not count:
                break
            self.count += count
            self._kept += buffer[:count]
        return bytes(self._kept[:num_bytes])

    def skip(self, num_bytes: int) -> int:
        """Drop bytes that `head` gave; return how many."""
        del self._kept[:num_bytes]
        return num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        if self._kept:
            count = min(len(view), len(self._kept))
            view[:count] = self._kept[:count]
            return self.skip(count)
        count = self._file.readinto(view)
        self.count += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressed:
    """A decompressor whose errors name the file."""

    def __init__(self, path: str, compression: Compression, file: Any) -> None:
        self._path, self._compression, self._file = path, compression, file

    def readinto(self, buffer: Buffer) -> int:
        """Read decompressed bytes into `buffer`; return how many."""
        try:
            return self._file.readinto(buffer)
        except (EOFError, OSError, zlib.error, ValueError) as error:
            raise ValueError(
                f"{self._path}: damaged, or cut off ({self._compression}: {error}); make or copy it again"
            ) from error

    def close(self) -> None:
        self._file.close()


def _decompressed(path: str, file: BinaryIO, compression: Compression) -> _Decompressed:
    if compression == "gzip":
        return _Decompressed(path, compression, gzip.GzipFile(fileobj=file))
    pyarrow = pyarrow_for(path, "zstd")
    return _Decompressed(path, compression, pyarrow.CompressedInputStream(file, "zstd"))
