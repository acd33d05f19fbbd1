"""A process of its own for chat templates, which are somebody else's programs: only the system can end them anywhere.

A handler of Python's runs between two of Python's instructions, and a template can spend hours in one (a search in a
text of a million characters, a comparison of nested lists). It can also overflow the stack. So the system ends this
process when its time is up, and the process that waits for it goes on.

It is forked: it has everything imported, is there after some milliseconds, and uses only what the fork's one thread
may use (jinja, json, pickle; no tokenizer, no torch).
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import pickle
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

_FORKS = "TOKENIZERS_PARALLELISM"
_LONGEST_MESSAGE = 200


class TemplateRaisedError(Exception):
    """What a template raised in the other process, as text.

    The exception itself stays there: a template can raise one whose text takes for ever to write.

    Attributes:
        kind: the name of the exception's class.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ProcessEndedError(Exception):
    """The process ended before it answered.

    Attributes:
        is_late: the system ended it because its time was up.
    """

    def __init__(self, status: int) -> None:
        number = -os.waitstatus_to_exitcode(status)
        super().__init__(signal.Signals(number).name if number > 0 else f"status {-number}")
        self.is_late = number == signal.SIGPROF


class RenderProcess:
    """A process that calls functions for this one, and ends when this one ends."""

    def __init__(self) -> None:
        importlib.import_module("transformers.utils.chat_template_utils")  # once, not in each process
        self._connection, theirs = Pipe()
        with _quiet_fork():
            self._pid = os.fork()
        if self._pid == 0:
            _serve(theirs)
        theirs.close()

    def call(self, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """Return what a function returns there; after any other error than the first the process is gone.

        Args:
            seconds: of that process's computing; a busy machine changes nothing.

        Raises:
            TemplateRaisedError: the function raised an exception.
            ProcessEndedError: the process ended.
        """
        try:
            # Not `send` and `recv`: their pickler has more to set up than most conversations have to say.
            self._connection.send_bytes(pickle.dumps((seconds, function, args), pickle.HIGHEST_PROTOCOL))
            value, raised = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise ProcessEndedError(self._reap()) from error
        except BaseException:  # an interrupt: an answer may be on its way
            os.kill(self._pid, signal.SIGKILL)
            self._reap()
            raise
        if raised is not None:
            raise TemplateRaisedError(*raised)
        return value

    def _reap(self) -> int:
        self._connection.close()
        with suppress(ChildProcessError):  # where the program ignores SIGCHLD
            return os.waitpid(self._pid, 0)[1]
        return 0


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """Keep Python's and the tokenizers' warnings about forks away: this fork uses neither threads nor tokenizers."""
    is_set = _FORKS in os.environ
    os.environ.setdefault(_FORKS, "true")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if not is_set:
            del os.environ[_FORKS]


def _serve(connection: Connection) -> NoReturn:
    """Call functions until the other process is gone."""
    try:
        _let_go(connection.fileno())
        while True:
            seconds, function, args = pickle.loads(connection.recv_bytes())
            signal.setitimer(signal.ITIMER_PROF, seconds)
            connection.send_bytes(pickle.dumps(_answer(function, args), pickle.HIGHEST_PROTOCOL))
    finally:  # whatever it is: this copy of the program must not go on
        os._exit(0)


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, tuple[str, str] | None]:
    try:
        return function(*args), None
    except Exception as error:
        line = (str(error).splitlines() or ["no message"])[0][:_LONGEST_MESSAGE]
        return None, (type(error).__name__, line)


def _let_go(kept: int) -> None:
    """Give up what a fork has of its parent: files and their locks, streams, handlers, and garbage to look through."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    # They are meant for the parent, with which this one ends.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    gc.freeze()
