"""The lines that a person sees of a run, apart from what Megatron, torch and NCCL print.

In a process that has called `divide`, descriptors 1 and 2 lead to this rank's log, whoever writes to them and from
whatever language; only the lines of this module reach the terminal. Elsewhere these lines are ordinary prints.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import IO, TextIO

PACKAGE = str(Path(__file__).parents[1])
TAIL_LINES = 30
_TAIL_BYTES = 1 << 16


class _Divided:
    """The terminal's two streams, and the log that has taken their place.

    The log is a file without a name until `keep` gives it one.
    """

    def __init__(self) -> None:
        self.out, self.err = _duplicate(sys.stdout, 1), _duplicate(sys.stderr, 2)
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # until the process ends
        self.path: Path | None = None
        self.show_warning, self.process = warnings.showwarning, os.getpid()
        self._point_at(self.log.fileno(), self.log.fileno())
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)

    def keep(self, path: Path) -> None:
        """Append everything printed so far to the file `path`, and everything printed from now on.

        Raises:
            OSError: the file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_fifo():  # nobody may ever read it
            raise OSError(errno.EINVAL, "it is a pipe", str(path))
        log = path.open("a+b", buffering=0)
        log.write(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n".encode())
        log.write(self.printed())
        self._point_at(log.fileno(), log.fileno())
        self.log.close()
        self.log, self.path = log, path

    def undo(self) -> None:
        """Give the terminal its descriptors back, and print there what was printed so far."""
        printed = self.printed()
        self._point_at(self.out.fileno(), self.err.fileno())
        self.out.write(printed.decode(errors="replace"))
        sys.excepthook, warnings.showwarning = sys.__excepthook__, self.show_warning

    def printed(self, most: int | None = None) -> bytes:
        """Return the end of the log, at most so many bytes; or all of it."""
        with contextlib.suppress(OSError):  # the log's disk is full
            sys.stdout.flush()
            sys.stderr.flush()
        size = os.fstat(self.log.fileno()).st_size
        start = 0 if most is None else max(0, size - most)
        # The file's position stays: descriptors 1 and 2 share it.
        return os.pread(self.log.fileno(), size - start, start)

    @staticmethod
    def _point_at(out: int, err: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(out, 1)
        os.dup2(err, 2)


_divided: _Divided | None = None


def divide() -> None:
    """Keep what this process prints from now on for `keep_log`; only `say` and `complain` print on the terminal.

    A warning of this package is then a line on the terminal. An exception that ends the process shows there what it
    is, with the end of the log.
    """
    global _divided
    if sys.stdout is None or sys.stderr is None:  # a closed descriptor: there is nothing to divide
        return
    _divided = _Divided()
    sys.excepthook, warnings.showwarning = _show_crash, _show_warning


def is_divided() -> bool:
    """Return whether the terminal gets the project's own lines alone, so that the rest may go to a log."""
    return _divided is not None


def keep_log(folder: Path) -> Path | None:
    """Store what this rank prints in a file in `folder`; return its path, or None if all goes to the terminal.

    An existing file, from an earlier start, is appended to.
    """
    global _divided
    if _divided is None:
        return None
    path = folder / f"rank{_rank()}.log"
    try:
        _divided.keep(path)
    except OSError as error:
        complain(f"megatron_fdd: warning: no log {path} ({error.strerror}): everything is printed here")
        _divided.undo()
        _divided = None
        return None
    return path


def say(text: str, *, is_chosen: bool | None = None) -> None:
    """Print on the terminal, on rank 0 alone.

    Args:
        is_chosen: whether this is the one rank that knows the text, where rank 0 does not.
    """
    if _rank() == "0" if is_chosen is None else is_chosen:
        _print(text, None if _divided is None else _divided.out, sys.stdout)


def complain(text: str) -> None:
    """Print on stderr, on any rank."""
    _print(text, None if _divided is None else _divided.err, sys.stderr)


def terminal() -> TextIO:
    """Return what people see of stderr, for a bar that is drawn where it is a terminal."""
    return sys.stderr if _divided is None else _divided.err


def log_traceback() -> None:
    """Print the traceback of the exception that is being handled, in the log only."""
    if _divided is not None:
        with contextlib.suppress(OSError):  # the log's disk is full
            traceback.print_exc()


def keep_traceback() -> Path | None:
    """Store the traceback of the exception that is being handled, and return the file; None if the terminal has it.

    Before `keep_log` there is no file: the log then gets one in a new folder for temporary files.
    """
    if _divided is None:
        traceback.print_exc()
        return None
    log_traceback()
    return _divided.path or keep_log(Path(tempfile.mkdtemp(prefix="megatron_fdd-")))


def last_line() -> str:
    """Return the last line that this rank has printed into its log; empty without a log."""
    if _divided is None:
        return ""
    lines = _divided.printed(_TAIL_BYTES).decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def full_log() -> str | None:
    """Return what keeps this rank's log from being written, with its path; None if nothing does."""
    if _divided is None:
        return None
    try:
        os.write(_divided.log.fileno(), b"\n")
    except OSError as error:
        where = _divided.path or f"in {tempfile.gettempdir()}"
        return f"the log {where} cannot be written: {error.strerror}"
    return None


def show_end_of_log() -> None:
    """Print on stderr the last lines of this rank's log; nothing without a log."""
    if _divided is None:
        return
    lines = deque(_divided.printed(_TAIL_BYTES).decode(errors="replace").splitlines(), TAIL_LINES)
    where = f" of {_divided.path}" if _divided.path is not None else ""
    print(f"The last lines{where}:", *lines, sep="\n    ", file=_divided.err, flush=True)


def _print(text: str, terminal: TextIO | None, stream: TextIO) -> None:
    """Print on the terminal, and in the log in its place between Megatron's lines."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        if terminal is None:
            raise
        # The log's disk is full: the message about it must still reach the terminal.
    if terminal is not None:
        try:
            print(text, file=terminal, flush=True)
        except OSError as error:  # the log has everything, and the run continues
            os.dup2(os.open(os.devnull, os.O_WRONLY), terminal.fileno())
            _tell_of_stdout(error, terminal)


def _tell_of_stdout(error: OSError, terminal: TextIO) -> None:
    """Say on stderr that stdout cannot be written; not where its reader is gone (`| head`, a hang-up)."""
    if _divided is not None and terminal is _divided.out and error.errno not in (errno.EPIPE, errno.EIO):
        where = "the log" if _divided.path is None else _divided.path
        complain(
            f"megatron_fdd: warning: stdout cannot be written any more ({error.strerror}); see {where} instead"
        )


def _show_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback to the log and its end to the terminal; stands in for `sys.excepthook`."""
    assert _divided is not None
    # Not through sys.stderr: torch's own hook, which calls this one, holds back what is written there.
    with contextlib.suppress(OSError):  # the log's disk is full
        sys.stderr.flush()
        _divided.log.write("".join(traceback.format_exception(kind, error, trace)).encode())
        _divided.log.flush()
    # In a forked reader of data it is a thread's that lost its parent (multiprocessing calls the hook).
    if issubclass(kind, KeyboardInterrupt) or os.getpid() != _divided.process:
        return
    first_line, *_ = str(error).splitlines() or [""]
    print(
        f"megatron_fdd: rank {_rank()} failed: {kind.__name__}: {first_line}", file=_divided.err, flush=True
    )
    show_end_of_log()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print this package's warnings on the terminal, others in the log; stands in for `warnings.showwarning`."""
    assert _divided is not None
    if filename.startswith(PACKAGE):
        complain(f"megatron_fdd: warning: {message}")
    else:
        _divided.show_warning(message, category, filename, lineno, file, line)


def _duplicate(stream: TextIO, descriptor: int) -> TextIO:
    """Return another stream to where `descriptor` leads now."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return os.fdopen(os.dup(descriptor), "w", buffering=1, encoding=encoding, errors="replace")


def _rank() -> str:
    """Return the rank as the launcher wrote it: a number, unless `plan/command_line.py` still has to refuse it."""
    return os.environ.get("RANK", "0")
