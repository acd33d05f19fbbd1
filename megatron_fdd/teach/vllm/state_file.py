"""The file that vLLM's connector writes for a request: waited for, read when it is whole, and removed.

A file `NAME.safetensors` has `hidden_states` [tokens, layers, width] and `token_ids` [tokens]; while vLLM writes it, it
holds an exclusive lock on `NAME.safetensors.lock`, which is there before the request is answered.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

# How long a file may take to appear, or a writer to end; network file systems show files of others late.
APPEAR_S, WRITE_S = 30.0, 300.0
_LOOK_S = 0.02
# Names of requests begin so: what a killed producer left is told by it from the files of others.
NAME_TAG = "fdd-teach-"
_OLD_S = 3600.0
_LARGEST_HEADER = 1 << 20


class StateFiles:
    """The folder in which a server writes.

    Args:
        stopped: ends all waiting.
    """

    def __init__(
        self,
        folder: Path,
        stopped: threading.Event,
        *,
        appear_s: float = APPEAR_S,
        write_s: float = WRITE_S,
    ) -> None:
        self.folder, self._stopped = folder, stopped
        self._appear_s, self._write_s = appear_s, write_s

    def path(self, told: str) -> Path:
        """Return where a file is here that has another path at the server."""
        return self.folder / os.path.basename(told)

    def read(self, told: str) -> dict[str, Tensor]:
        """Wait until a file is whole, and read it.

        Args:
            told: its path at the server.

        Raises:
            ValueError: it does not appear, does not become whole, or is no safetensors file.
        """
        path = self.path(told)
        lock = path.with_name(f"{path.name}.lock")
        self._until(
            lambda: path.exists() or lock.exists(),
            self._appear_s,
            f"--hidden-states {self.folder}: the server wrote {told}, which does not appear here in "
            f"{self._appear_s:.0f} s; give the folder that it has as shared_storage_path, as this machine sees it",
        )
        if lock.exists():
            self._wait_for_writer(lock)
        self._until(
            path.exists,
            self._appear_s,
            f"{path}: the server let go of its lock and wrote no file; its log has the reason (Hidden-states write "
            "failed): make room in that folder, and start the same command again",
        )
        self._until(
            lambda: _missing_bytes(path) == 0,
            self._appear_s,
            f"{path}: is cut off or longer than its header says; make room in that folder, leave "
            "use_synchronization_lock on, and start the same command again",
        )
        try:
            return load(path.read_bytes())
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); start the same command again") from error

    def remove(self, told: str) -> None:
        """Remove a file that was taken over, and its lock."""
        path = self.path(told)
        for each in (path, path.with_name(f"{path.name}.lock")):
            with suppress(FileNotFoundError):
                each.unlink()

    def sweep(self) -> int:
        """Remove what killed producers have asked for and not taken over; return how many files."""
        old = [path for path in self.folder.glob(f"*{NAME_TAG}*.safetensors*") if _age_s(path) > _OLD_S]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def _wait_for_writer(self, lock: Path) -> None:
        with suppress(FileNotFoundError), lock.open() as file:
            try:
                self._until(
                    lambda: _is_free(file.fileno()),
                    self._write_s,
                    f"{lock}: the server holds it for {self._write_s:.0f} s; look at its log, and start the same "
                    "command again",
                )
            except OSError as error:
                raise ValueError(
                    f"{lock}: the file system has no locks ({error.strerror}); mount it with flock, or give the server "
                    "and --hidden-states another folder"
                ) from error

    def _until(self, is_so: Callable[[], bool], most_s: float, otherwise: str) -> None:
        """Wait for something. ValueError with the words `otherwise` if it does not come."""
        end_s = time.monotonic() + most_s
        while not is_so():
            if time.monotonic() > end_s or self._stopped.wait(_LOOK_S):
                raise ValueError(otherwise)


def _is_free(descriptor: int) -> bool:
    """Whether nobody writes under a lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EINTR):
            return False
        raise
    return True


def _missing_bytes(path: Path) -> int | None:
    """Return by how many bytes a file is too short; None where not even its header can be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LARGEST_HEADER:
                return None
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return int(8 + length + max(ends, default=0) - path.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _age_s(path: Path) -> float:
    with suppress(OSError):
        return time.time() - path.stat().st_mtime
    return 0.0
