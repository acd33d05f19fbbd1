"""Limits for a chat template at work, which is somebody else's program: its time, its memory, the length of its text.

transformers runs templates in jinja's sandbox, which keeps them from files and from Python, but not from counting to
10**10 or from writing a text of 100 GB.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections import Counter
from types import FrameType, TracebackType
from typing import Any

# A template needs about a millisecond for a conversation, and some megabytes.
SECONDS = 5
_MEMORY_BYTES = 2**29
LONGEST_TEXT = 2**24
_TRIES = 3
_STATM = "/proc/self/statm"
_PAGE_BYTES = resource.getpagesize()
# How often each template was stopped in this process, by its text.
_stopped: Counter[str] = Counter()


class TemplateLimitError(ValueError):
    """A chat template that takes more time or memory than any conversation needs."""


class Limits:
    """A context that stops a template after `SECONDS`, or when it takes 512 MiB of memory.

    A template that was stopped three times is not tried again: a file of a million records would take months.

    The time is that of this process, so that a busy machine changes nothing; it is limited in the main thread only,
    where Python runs signal handlers. Memory is limited where the system tells how much is in use (Linux). Both
    together took 25 us where it was measured.

    Args:
        source: the template.

    Raises:
        TemplateLimitError: a limit was reached.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._handler: Any = None
        self._address_space: tuple[int, int] | None = None

    def __enter__(self) -> None:
        """Set the limits."""
        if _stopped[self._source] >= _TRIES:
            raise TemplateLimitError("it was stopped on earlier conversations: too much time, memory or text")
        in_use = _bytes_in_use()
        if in_use is not None:
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = in_use + _MEMORY_BYTES
            if soft == resource.RLIM_INFINITY or soft > most:
                self._address_space = soft, hard
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        if self._in_main_thread:
            self._handler = signal.signal(signal.SIGVTALRM, _stop)
            # Again and again: Python drops an exception that is raised inside of a destructor.
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, SECONDS / 10)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Lift the limits, and count a template that has reached one."""
        if self._in_main_thread:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, self._handler)
        if self._address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, self._address_space)
        if isinstance(error, MemoryError | TemplateLimitError):
            _stopped[self._source] += 1
        if isinstance(error, MemoryError):
            raise TemplateLimitError("it takes more than 512 MiB of memory for one conversation") from error


def check_length(text: str) -> None:
    """Refuse a text that no training sample can hold.

    Raises:
        TemplateLimitError: names the length.
    """
    if len(text) > LONGEST_TEXT:
        raise TemplateLimitError(
            f"it writes {len(text):,} characters for one conversation, and {LONGEST_TEXT:,} are the most"
        )


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise TemplateLimitError(f"it computes for more than {SECONDS} s on one conversation")


def _bytes_in_use() -> int | None:
    """Return the size of this process's address space; None where the system does not tell it."""
    try:
        file = os.open(_STATM, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return int(os.read(file, 100).split()[0]) * _PAGE_BYTES
    finally:
        os.close(file)
