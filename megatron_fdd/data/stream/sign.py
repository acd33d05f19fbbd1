"""Signs of life: small files that change every second, and how long one has not, by the observer's own clock."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_fdd.host.json_file import read_json

BEAT_S = 1.0
# A process whose sign has not changed for so long is taken for dead.
STALE_S = 60.0


Clock = Callable[[], float]


class Sign:
    """A process's own sign of life, which a thread renews until it is closed.

    What cannot be written now is written a second later: a full disk must not end a training.

    Args:
        about: what stands in the file, beside a number that rises.
    """

    def __init__(self, path: Path, **about: Any) -> None:
        self._path, self._about, self._beat = path, about, 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def tell(self, **about: Any) -> None:
        """Change what stands in the file, from the next second on."""
        with self._lock:
            self._about |= about

    def close(self, **about: Any) -> None:
        """Write a last time, with changes."""
        self._closed.set()
        self._thread.join()
        self._about |= about
        self._write()

    def leave(self, last: Path) -> None:
        """End; the last sign takes the place of another process's, which ended before."""
        self.close()
        with contextlib.suppress(OSError):
            os.replace(self._path, last)
        self._path.unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._write()

    def _write(self) -> None:
        with self._lock:
            self._beat += 1
            text = json.dumps({"beat": self._beat, **self._about})
        part = self._path.with_name(f".{self._path.name}.part")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            os.replace(part, self._path)


def read_sign(path: Path) -> dict[str, Any] | None:
    """Return what stands in a sign; None if there is none that can be read."""
    try:
        return read_json(path)
    except (ValueError, OSError):
        return None


def changing(paths: Iterable[Path]) -> Path | None:
    """Return a sign of a process that is alive and has not ended, if there is one; that takes a few seconds."""
    signs = {path: read_sign(path) or {} for path in paths}
    before = {path: sign.get("beat") for path, sign in signs.items() if sign.get("state") == "running"}
    until_s = time.monotonic() + 3 * BEAT_S
    while before and time.monotonic() < until_s:
        time.sleep(BEAT_S / 4)
        for path, beat in before.items():
            now = read_sign(path)
            if now is not None and now.get("beat") != beat:
                return path
    return None


class Watch:
    """How long values have not changed, since this process first looked at them.

    Args:
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[Any, tuple[Any, float]] = {}

    def unchanged_s(self, key: Any, value: Any) -> float:
        """Note the value that something has now; return for how many seconds it has had it."""
        now, seen = self._clock(), self._seen.get(key)
        if seen is None or seen[0] != value:
            seen = self._seen[key] = value, now
        return now - seen[1]

    def forget_others(self, keys: Iterable[Any]) -> None:
        """Forget all but some things, which are there still."""
        self._seen = {key: self._seen[key] for key in keys if key in self._seen}
