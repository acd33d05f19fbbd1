"""Files to read that may be pipes: nobody waits for ever for one to which nothing writes."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import FileIO

# What writes to a named pipe is started beside its reader.
_WRITER_S = 20.0


def open_to_read(path: str) -> FileIO:
    """Open a file or a pipe, unbuffered; a named pipe is waited for, but not for ever.

    Raises:
        ValueError: it is a device, or a pipe to which nothing writes.
        OSError: it cannot be opened.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):  # some never end
        raise ValueError(f"{path} is a device; give a file or a pipe")
    return open(_open_pipe(path) if stat.S_ISFIFO(mode) else path, "rb", buffering=0)


def _open_pipe(path: str) -> int:
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(os.open, path, os.O_RDONLY)
        try:
            return opening.result(_WRITER_S)
        except TimeoutError as error:
            raise ValueError(
                f"{path} is a pipe, and nothing writes to it, for {_WRITER_S:g} s now; start what is to write, or give "
                "a file"
            ) from error
        finally:
            if not opening.done():
                _end_wait(path)
                os.close(opening.result())


def _end_wait(path: str) -> None:
    """Let a thread that opens a named pipe go on: a writer is there for a moment."""
    with suppress(OSError):  # it has just found another
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
