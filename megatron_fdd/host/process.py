"""What a rank owes its launcher: which rank it is, an error that is heard, and an end when it is told to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_fdd.host import console

# How much later than another rank rank 0 may come to the same error: what its imports and reading differ by.
PATIENCE_S = 15.0


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the launch (torchrun's environment)."""
    return os.environ.get("RANK", "0") == "0"


def print_error(line: str) -> None:
    """Print `line` on stderr before this rank ends: once for all ranks, whichever of them is the quickest.

    As soon as one rank has ended torchrun ends the others, rank 0 with its message perhaps among them. So another
    rank waits until rank 0 has spoken and is itself ended meanwhile. If it is not, the error is its own: it says so.
    """
    if not is_first_rank():
        time.sleep(PATIENCE_S)
        line = f"rank {os.environ['RANK']}: {line}"
    console.complain(line)


def end_at_interrupt() -> None:
    """From now on Ctrl-C ends this process without a traceback: imports take seconds and have nothing to tell."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell had it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_at_interrupt() -> None:
    """Undo `end_at_interrupt`: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def ended_by_sigterm(last_words: Callable[[], None]) -> Iterator[None]:
    """In a block SIGTERM ends this process at once, with `last_words` and status 143. In the main thread only.

    A thread does it: on a GPU the main one may wait for a rank that has ended already, and would never come to it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.signal(signal.SIGTERM, _leave_to_the_thread)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # gets the number of each signal, whoever waits
    threading.Thread(target=_listen, args=(reading, last_words), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, before)
        os.close(writing)


def _listen(reading: int, last_words: Callable[[], None]) -> None:
    while signals := os.read(reading, 64):
        if signal.SIGTERM in signals:
            last_words()
            os._exit(128 + signal.SIGTERM)
    os.close(reading)


def _leave_to_the_thread(_signal: int, _frame: FrameType | None) -> None:
    """Python writes to the pipe only where a signal has a handler."""


def _forget_sigterm() -> None:
    """A forked process, such as a worker that loads data, is ended by its own SIGTERM and wakes nobody."""
    if signal.getsignal(signal.SIGTERM) is _leave_to_the_thread:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_sigterm)
