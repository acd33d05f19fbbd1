"""What a launcher needs of each rank: the rank's number, errors that are heard, and an end on request."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_fdd.host import console

# How much later than another rank rank 0 may reach the same error; imports and reading take different times.
PATIENCE_S = 15.0
# Python's own status when it cannot write what it has printed.
_NOT_FLUSHED = 120
# Signals that ask a process to end: a scheduler's, and that of a terminal which is closed.
_ENDING = (signal.SIGTERM, signal.SIGHUP)
# An option of Linux's prctl.
_PR_SET_PDEATHSIG = 1


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the launch (torchrun's environment)."""
    return os.environ.get("RANK", "0") == "0"


def print_error(line: str) -> None:
    """Print `line` on stderr before this rank ends: once for all ranks, whichever rank is the quickest.

    As soon as one rank has ended, torchrun ends the others, perhaps also rank 0 before its message. So another rank
    waits until rank 0 has printed, and is itself ended meanwhile. If it is not ended, the error is its own, and it
    prints it.
    """
    if not is_first_rank():
        time.sleep(PATIENCE_S)
    print_own_error(line)


def print_own_error(line: str) -> None:
    """Print `line` on stderr at once, on any rank, with its number except on rank 0."""
    console.complain(line if is_first_rank() else f"rank {os.environ['RANK']}: {line}")


def end_with(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end this process with the status that it returns, or with that of its `sys.exit`.

    As always, an exception is printed (status 1), process groups are destroyed, other threads are waited for, exit
    handlers are called and the streams flushed. After an error, groups end with the process: to destroy one, NCCL may
    wait for a collective whose other ranks never come, and torchrun would hear of the error only minutes later. The
    interpreter is not torn down: a thread of gloo or NCCL that still lets go of the last collective's tensors needs
    it, and where it is gone ends the process with SIGABRT ("terminate called without an active exception"), after all
    work is done.
    """
    try:
        status = main() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    distributed = sys.modules.get("torch.distributed")
    if status == 0 and distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):  # a pipe that nobody reads, a closed stream
            status = status or _NOT_FLUSHED
        except OSError as error:  # a full disk
            status = status or _NOT_FLUSHED
            with suppress(OSError):
                os.write(
                    2, f"what was printed cannot be written: {error.strerror}; make room there\n".encode()
                )
    os._exit(status & 0xFF)


def begin_as_rank() -> None:
    """Do what `end_with_launcher` and `end_at_interrupt` say; the first thing that a rank does."""
    end_with_launcher()
    end_at_interrupt()


def end_with_launcher() -> None:
    """Let the system end this rank as soon as torchrun is gone, however it ended.

    A launcher that is killed ends none of its ranks: they would go on without their rendezvous, or wait for it half an
    hour, with all the memory that they have. Nothing is lost, as by any `kill -9`. Ranks of other launchers, which
    have a parent of their own, are left alone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():  # it was gone before
        os._exit(128 + signal.SIGKILL)


def end_at_interrupt() -> None:
    """Make Ctrl-C end this process without a traceback from now on.

    Imports take seconds, and a traceback from them tells nothing.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless a shell has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_at_interrupt() -> None:
    """Undo `end_at_interrupt`: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def ended_like_interrupt() -> Iterator[None]:
    """Make SIGTERM and SIGHUP a KeyboardInterrupt inside a `with` statement, so that a command cleans up after itself.

    A signal that somebody else handles or ignores (`nohup`) is left alone, and so is everything outside of the main
    thread. Further signals do not disturb the cleaning.
    """
    is_main = threading.current_thread() is threading.main_thread()
    ours = [each for each in _ENDING if is_main and signal.getsignal(each) is signal.SIG_DFL]
    for each in ours:
        signal.signal(each, _raise_interrupt)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


def status_after(interrupt: KeyboardInterrupt) -> int:
    """Return the exit status of a command that was interrupted, by Ctrl-C or by a signal as above."""
    (number,) = interrupt.args or (signal.SIGINT,)
    return 128 + int(number)


def _raise_interrupt(number: int, _frame: FrameType | None) -> None:
    for each in _ENDING:
        if signal.getsignal(each) is _raise_interrupt:
            signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


@contextmanager
def ended_by_sigterm(last_words: Callable[[], None]) -> Iterator[None]:
    """Make SIGTERM end this process at once inside a `with` statement, with `last_words` and status 143.

    Call it in the main thread. Another thread ends the process: on a GPU the main thread may wait for a rank that
    has ended already, and would never handle the signal.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.signal(signal.SIGTERM, _leave_to_the_thread)
    signal.set_wakeup_fd(
        writing, warn_on_full_buffer=False
    )  # receives every signal's number, whichever thread waits
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
    """Do nothing: Python writes to the pipe only if a signal has a handler."""


def _forget_handlers() -> None:
    """Let a forked process, such as a worker that loads data, end by its own signals without waking anybody."""
    if signal.getsignal(signal.SIGTERM) is _leave_to_the_thread:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for each in _ENDING:
        if signal.getsignal(each) is _raise_interrupt:
            signal.signal(each, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_handlers)
