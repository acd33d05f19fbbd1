"""Limits for a chat template at work, which is somebody else's program: its time, its memory, the length of its text.

transformers runs templates in jinja's sandbox, which keeps them from files and from Python, but not from counting to
10**10 or from writing a text of 100 GB.
"""

from __future__ import annotations

import functools
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_fdd.data.render_process import ProcessEndedError, RenderProcess, TemplateRaisedError

# A template needs about a millisecond for a conversation, and some megabytes.
SECONDS = 5.0
_MEMORY_BYTES = 2**29
LONGEST_TEXT = 2**24
_TRIES = 3
_PAGE_BYTES = resource.getpagesize()
# How often each template was stopped in this process, by its text.
_stopped: Counter[str] = Counter()
_process: RenderProcess | None = None
_one_at_a_time = threading.Lock()


class TemplateLimitError(ValueError):
    """A chat template that takes more time or memory than any conversation needs."""


def limited(source: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns in a process of its own, at most `SECONDS` of computing later.

    A template that was stopped three times is not tried again: a file of a million records would take months.

    The time is that of the other process, so that a busy machine changes nothing. Memory is limited where the system
    tells how much is in use (Linux).

    Args:
        source: the template at work.
        function: of a module; its arguments and result can be pickled.

    Raises:
        TemplateLimitError: a limit was reached.
        TemplateRaisedError: the function raised an exception.
    """
    global _process
    if _stopped[source] >= _TRIES:
        raise TemplateLimitError("it was stopped on earlier conversations: too much time, memory or text")
    with _one_at_a_time:
        process, _process = _process or RenderProcess(), None
        try:
            value = process.call(SECONDS, _in_memory, function, args)
        except ProcessEndedError as error:
            _stopped[source] += 1
            if error.is_late:
                raise TemplateLimitError(
                    f"it computes for more than {SECONDS:g} s on one conversation"
                ) from error
            raise TemplateLimitError(f"it ends the process that runs it ({error})") from error
        except TemplateRaisedError as error:
            _process = process
            if error.kind not in (MemoryError.__name__, TemplateLimitError.__name__):
                raise
            _stopped[source] += 1
            raise TemplateLimitError(str(error)) from error
        _process = process
    return value


def check_length(text: str) -> None:
    """Refuse a text that no training sample can hold.

    Raises:
        TemplateLimitError: names the length.
    """
    if len(text) > LONGEST_TEXT:
        raise TemplateLimitError(
            f"it writes {len(text):,} characters for one conversation, and {LONGEST_TEXT:,} are the most"
        )


def _in_memory(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return what a function returns that may take 512 MiB of memory more than are in use."""
    try:
        with _limited_memory():
            return function(*args)
    except MemoryError as error:
        raise TemplateLimitError("it takes more than 512 MiB of memory for one conversation") from error


@contextmanager
def _limited_memory() -> Iterator[None]:
    in_use = _bytes_in_use()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if in_use is None or soft != resource.RLIM_INFINITY and soft <= in_use + _MEMORY_BYTES:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _bytes_in_use() -> int | None:
    """Return the size of this process's address space; None where the system does not tell it."""
    file = _statm()
    return None if file is None else int(os.pread(file, 100, 0).split()[0]) * _PAGE_BYTES


@functools.cache
def _statm() -> int | None:
    """Open what tells the size; once, in the process for templates only."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except FileNotFoundError:
        return None


def _forget_process() -> None:
    """Let a forked process start one of its own."""
    global _process, _one_at_a_time
    _process, _one_at_a_time = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_process)
