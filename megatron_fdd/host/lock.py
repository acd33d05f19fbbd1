"""A lock on a folder, by a file in it: for one process at a time, on any machine that sees the folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TakenError(Exception):
    """Another process has the lock; its text says which one."""


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep others that ask for the lock `path` out during a `with` block. The file stays.

    The kernel releases the lock when this process ends, however it ends; processes forked from it do not hold it. A
    file system without locks keeps nobody out.

    Raises:
        TakenError: another process has it.
        OSError: the file cannot be opened.
    """
    with path.open("a+b", buffering=0) as file:  # closing it must not write, and fail
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX lets the system choose between these two
            file.seek(0)
            raise TakenError(file.readline().decode(errors="replace").strip()) from error
        except OSError:
            pass
        with contextlib.suppress(OSError):  # other code reports a full disk
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
