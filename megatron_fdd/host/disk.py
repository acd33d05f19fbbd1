"""Errors of files that cannot be written or read: the place, what the system reported, and what to do."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Buffer, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import IOBase
from pathlib import Path
from typing import IO

# Words in the RuntimeError of torch's writer when a file could not take all of its bytes.
_TORCHS_WRITER = ("inline_container.cc", "PytorchStreamWriter")
_PIECE_BYTES = 512 << 10
# Seconds of writing between two flushes.
_FLUSH_S = 0.2
_ROOM = "make room there, or give another place"
_RIGHTS = "give a place that you may use"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or give another place",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What can be in the place of a file, links followed.
_NO_FILES = (
    (stat.S_ISDIR, "is a folder; name a file in it"),
    (stat.S_ISLNK, "is a symbolic link that leads back to itself; give another place"),
    (stat.S_ISFIFO, "is a pipe, and a regular file is needed; give another place"),
    (stat.S_ISSOCK, "is a socket, and a regular file is needed; give another place"),
    (lambda mode: not stat.S_ISREG(mode), "is a device, and a regular file is needed; give another place"),
)
# What can be in the place of a folder, links followed.
_NO_FOLDERS = ((stat.S_ISREG, "a file"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def regular_file(flag: str, given: str | Path) -> Path:
    """Return the file to which `given`, the value of `flag`, leads through symbolic links; it need not exist yet.

    A file that replaces another one must be renamed to this path: at `given`, it would take the place of a link.

    Raises:
        ValueError: a folder, a pipe, a socket or a device is there, or no file can be there.
    """
    real = Path(os.path.realpath(given))
    try:
        mode = real.lstat().st_mode
    except FileNotFoundError:
        return real
    except OSError as error:
        raise _refusal(flag, given, error) from error
    for is_so, what in _NO_FILES:
        if is_so(mode):
            raise ValueError(f"{flag} {given}: {what}")
    return real


def check_no_link(scratch: Path, told: str) -> None:
    """Refuse a link in the place of a scratch folder: its target would be emptied.

    Args:
        told: begins the message.

    Raises:
        ValueError: names the link.
    """
    if scratch.is_symlink():
        raise ValueError(
            f"{told}: {scratch} is a link, and a folder of this program belongs there; remove it"
        )


@contextmanager
def writing(flag: str, given: str | Path) -> Iterator[None]:
    """Turn errors of writing to `given`, the value of `flag`, into a refusal that says what to do.

    `given` is a folder, or the beginning of file names.

    Raises:
        ValueError: a file could not be written. Errors about other files are raised unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or not _is_about(error, Path(given)):
            raise
        raise _refusal(flag, given, error) from error
    except RuntimeError as error:
        if not is_torchs_writer(error):
            raise
        raise _refusal(flag, given, error) from error


@contextmanager
def naming(scratch: str | Path, told: str | Path) -> Iterator[None]:
    """Let a refusal name `told` in place of `scratch`, which nobody has given and which is gone when one reads it."""
    try:
        yield
    except ValueError as error:
        if str(scratch) not in str(error):
            raise
        raise ValueError(str(error).replace(str(scratch), str(told))) from error


def check_folder(flag: str, given: str | Path, folder: str | Path) -> None:
    """Refuse a folder that `given`, the value of `flag`, needs and that cannot be made or written to. Nothing is made.

    Raises:
        ValueError: something else is in its place, or files cannot be made in it, or in the nearest folder above.
    """
    try:
        with suppress(FileNotFoundError):
            os.stat(folder)  # a name that is too long, a link that leads back to itself, a file above
        if os.path.lexists(folder) and not os.path.exists(folder):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        with tempfile.TemporaryFile(dir=_nearest(Path(folder))):
            pass
    except OSError as error:
        raise _refusal(flag, given, error) from error


class _InPieces(io.FileIO):
    """A file that takes a large write in pieces."""

    def write(self, data: Buffer, /) -> int:
        return super().write(memoryview(data)[:_PIECE_BYTES])


def large_file(path: Path) -> io.BufferedWriter:
    """Open a new file for writes of megabytes.

    Linux would cache them in pages of 2 MiB, for which a virtual machine may have to ask its host: in pieces of 512 KiB
    a write takes half to a fifth of the processor time.
    """
    return io.BufferedWriter(_InPieces(path, "w"))


@contextmanager
def flushed_behind(file: IO[bytes] | IOBase) -> Iterator[None]:
    """Send what is written to a file to the disk meanwhile, so that the `fsync` at its end has little to wait for.

    Otherwise the system keeps gigabytes in memory, and the disk stands idle until the end.

    Raises:
        OSError: the disk took something not. It is told once only, so that a later `fsync` would not know.
    """
    ended = threading.Event()

    def flush() -> None:
        while not ended.wait(_FLUSH_S):
            os.fdatasync(file.fileno())

    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(flush)
        try:
            yield
        finally:
            ended.set()
        flushing.result()


def make_folder(flag: str, given: str | Path, folder: str | Path) -> None:
    """Make the folder that `given`, the value of `flag`, needs, and check that files can be made in it.

    Raises:
        ValueError: the folder or a file in it cannot be made.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _refusal(flag, given, error) from error


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a place beside `path` to write to, which becomes `path` at the end of the block, whole or not at all.

    After an error nothing is left there: on a full disk half a file would take the room that is asked for.

    Args:
        shared: whether other processes may write the same file at the same time.
    """
    mark = f".{os.getpid()}" if shared else ""
    partial = path.with_name(f"{path.name}{mark}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def sized(num_bytes: float) -> str:
    """Write a number of bytes in the unit that suits it, to three digits: 71.2 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.0f} PB"


def free_bytes(given: str | Path) -> int:
    """Return the room of the file system on which `given` is, or would be made."""
    return shutil.disk_usage(_nearest(Path(given))).free


def is_torchs_writer(error: BaseException) -> bool:
    """Whether torch could not write a file; its writer raises no OSError."""
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCHS_WRITER)


@contextmanager
def told_by_torchs_writer() -> Iterator[None]:
    """Raise what stopped torch's writer, a full disk or an interrupt: the end of its file then fails in other words."""
    try:
        yield
    except RuntimeError as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, OSError | KeyboardInterrupt):
            behind = behind.__context__
        if behind is None or not is_torchs_writer(error):
            raise
        raise behind from None


def explain(error: Exception) -> str:
    """Return what a command prints about an error; for an error of the system, with the file and what to do."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    where = f"{names}: " if names else _own_log() if error.errno in _NO_ROOM else ""
    return f"{where}{error.strerror}; {_REMEDIES.get(error.errno, 'give another path')}"


def _own_log() -> str:
    """Name the file to which this process prints, for an error of writing that names none; nothing if it is none."""
    with suppress(OSError):
        if stat.S_ISREG(os.fstat(1).st_mode):
            log = Path(os.readlink("/proc/self/fd/1"))
            where = f"a temporary file in {log.parent} (TMPDIR)" if log.name.endswith("(deleted)") else log
            return f"perhaps what this process prints to {where}: "
    return ""


def _refusal(flag: str, given: str | Path, error: OSError | RuntimeError) -> ValueError:
    there = _nearest(Path(given))
    if isinstance(error, OSError):
        said, remedy = error.strerror, _REMEDIES.get(error.errno or 0, "give another place")
    else:
        said, remedy = f"torch's writer failed: {str(error).splitlines()[0]}", _ROOM
    if os.path.islink(given) and not os.path.exists(given):
        remedy = f"it is a link to {os.path.realpath(given)}, which does not exist: give another place"
    elif isinstance(error, FileExistsError | NotADirectoryError) and not there.is_dir():
        what = next((name for is_so, name in _NO_FOLDERS if is_so(there.stat().st_mode)), "a device")
        return ValueError(
            f"{flag} {given}: cannot be written: {there} is {what}, and a folder is needed; give another place"
        )
    free = shutil.disk_usage(there).free >> 20
    return ValueError(f"{flag} {given}: cannot be written: {said} ({free} MiB free there); {remedy}")


def _nearest(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if os.path.exists(each))  # whatever the name


def _is_about(error: OSError, given: Path) -> bool:
    """Whether an error names no file, or a file that belongs to `given`.

    Such a file is at `given`, above it, or beside it with its name inside.
    """
    names = [Path(os.path.realpath(name)) for name in (error.filename, error.filename2) if name is not None]
    real = Path(os.path.realpath(given))
    return not names or any(
        real.is_relative_to(name)
        or (name.is_relative_to(real.parent) and real.name in name.relative_to(real.parent).parts[0])
        for name in names
    )
