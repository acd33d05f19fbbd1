"""One line about an error that Megatron raises: what it says, or the condition that it asserts, and its place."""

from __future__ import annotations

import ast
import contextlib
import linecache
import re
import textwrap
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

from megatron_fdd.host import console
from megatron_fdd.host.console import PACKAGE
from megatron_fdd.host.process import print_error, print_own_error

# Packages whose lines tell more than those of the libraries that they call.
_SPEAKING = re.compile(r"(?s).*/(?=(megatron|megatron_fdd)/)")
_OF_LIBRARIES = re.compile(r"^<|/(site|dist)-packages/|/lib/python\d[\d.]*/")
_LONGEST = 400


@contextlib.contextmanager
def megatrons_errors(what: str) -> Iterator[None]:
    """Raise a ValueError in place of Megatron's errors in a `with` block about `what`, and where it would exit."""
    try:
        yield
    except SystemExit as end:
        raise ValueError(
            f"Megatron refuses {what}: it exits at {_place(end)}; give --fdd-verbose to see what it printed"
        ) from end
    except Exception as error:
        if is_from_here(error) or is_of_log(error):
            raise
        raise ValueError(f"Megatron refuses {what}: {in_one_line(error)}") from error


def ended(end: SystemExit) -> str:
    """Return in one line that Megatron has ended a training, and the last line that it has printed."""
    said = console.last_line() or "give --fdd-verbose to see what it printed"
    return f"Megatron ended this run ({_place(end)}): {said}"


def say_error(error: Exception, whole: str | None) -> None:
    """Print one line about an error of a run, and keep its traceback.

    Args:
        whole: names the checkpoint from which the run would go on; None in the preparation, where every rank meets the
            same error. Later a rank may have its own, and says it at once, unless it is a refusal of this package.
    """
    if is_from_here(error) and isinstance(error, (ValueError, FloatingPointError)):
        console.log_traceback()
        print_error(f"megatron_fdd: error: {error}")
        return
    say = print_error if whole is None else print_own_error
    if is_of_log(error):
        way = "" if whole is None else f". The same command then goes on from {whole}"
        say(f"megatron_fdd: error: {console.full_log()}; make room there{way}")
        return
    if is_of_worker(error):
        way = "" if whole is None else f". The same command then goes on from {whole}"
        said = " ".join(str(error).split()).rstrip(".")
        say(
            f"megatron_fdd: error: a process of --num-workers, which reads data, was ended ({said}); where memory ran "
            f"out, give fewer{way}"
        )
        return
    kept = console.keep_traceback()
    where = "" if kept is None else f"; the traceback is in {kept}"
    say(f"megatron_fdd: error: {in_one_line(error)}{where}")


def is_told(error: BaseException) -> bool:
    """Whether a line says all of an error in a training; of others the end of the log tells more."""
    return isinstance(error, (ValueError, FloatingPointError)) or is_of_log(error) or is_of_worker(error)


def is_of_log(error: BaseException) -> bool:
    """Whether something could not be printed, because this rank's log cannot be written."""
    return isinstance(error, OSError) and error.filename is None and console.full_log() is not None


def is_of_worker(error: BaseException) -> bool:
    """Whether a process that reads data has ended: torch notices it anywhere, or cannot take its next batch."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    frames = traceback.extract_tb(error.__traceback__)
    is_broken = isinstance(error, (ConnectionError, EOFError))
    return is_broken and any("torch/utils/data/" in frame.filename for frame in frames)


def is_from_here(error: BaseException) -> bool:
    """Whether a line of this package raised an error."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)


def in_one_line(error: BaseException) -> str:
    """Return in one line what an error says, and where it was raised; without words, the condition that is asserted."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and not text:
        text = _condition(error)
    elif not text or not isinstance(error, (AssertionError, ValueError, OSError)):  # else it is a sentence
        text = f"{type(error).__name__}: {text}"
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return f"{shown} ({_place(error)})"


def _place(error: BaseException) -> str:
    """Return the file and line that raised an error: of the last line that is no library's, but Megatron's or ours."""
    entries = traceback.extract_tb(error.__traceback__)
    speaking = [
        entry
        for entry in entries
        if _SPEAKING.match(entry.filename) or not _OF_LIBRARIES.search(entry.filename)
    ]
    last = (speaking or entries)[-1]
    return f"{_SPEAKING.sub('', last.filename)}:{last.lineno}"


def _condition(error: AssertionError) -> str:
    """Return the asserted condition as Megatron's source (0.19.2) has it, with its values; arguments as flags."""
    entry = traceback.extract_tb(error.__traceback__)[-1]
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    first, last = entry.lineno or 0, entry.end_lineno or entry.lineno or 0
    source = "".join(linecache.getlines(entry.filename)[first - 1 : last])
    try:
        [statement] = ast.parse(textwrap.dedent(source)).body
    except (SyntaxError, ValueError):  # no whole statement
        return "a condition without a text"
    if not isinstance(statement, ast.Assert):
        return f"`{ast.unparse(statement)}`"
    condition = _as_flags(ast.unparse(statement.test))
    missing = re.fullmatch(r"(--[\w-]+) is not None", condition)
    if missing:
        return f"{missing[1]} is missing"
    values = _values(statement.test, frame)
    return f"needed is {condition}" + (f", and {', '.join(values)}" if values else "")


def _values(node: ast.AST, frame: FrameType) -> list[str]:
    """Return "name is value" for the numbers and texts that a condition reads."""
    if not isinstance(node, (ast.Name, ast.Attribute)):
        found = [each for child in ast.iter_child_nodes(node) for each in _values(child, frame)]
        return list(dict.fromkeys(found))
    name = ast.unparse(node)
    value = _lookup(node, frame)
    if isinstance(value, (bool, int, float, str)):
        return [f"{_as_flags(name)} is {value}"]
    return []


def _lookup(node: ast.AST, frame: FrameType) -> Any:
    """Return the value of `a` or `a.b.c` in a frame; None if it cannot be read there."""
    if isinstance(node, ast.Attribute):
        return getattr(_lookup(node.value, frame), node.attr, None)
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id)
    return None


def _as_flags(text: str) -> str:
    return re.sub(r"(?<![.\w])args\.(\w+)", lambda match: f"--{match[1].replace('_', '-')}", text)
