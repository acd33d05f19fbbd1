"""Panics of libraries in Rust, such as tokenizers, which arrive as a BaseException, past every `except Exception`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Rust prints a panic itself, and with this set to 1, as some images have it, a hundred lines more. It looks only once.
os.environ["RUST_BACKTRACE"] = "0"


# How Rust begins what it prints of a panic.
_BEGINNING = re.compile(rb"^\s*thread '.*?' (\(\d+\) )?panicked at ", re.MULTILINE)


class PanicError(ValueError):
    """A panic, with the first line of what it said."""


@contextmanager
def panics_as_errors(told: str | None = None) -> Iterator[None]:
    """Raise an error in place of a panic in a `with` block.

    Args:
        told: begins the message; says what failed and what to do.

    Raises:
        PanicError: there was a panic. Other errors are raised unchanged.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":  # the class of panics cannot be imported
            raise
        line = next(iter(str(error).splitlines()), "a panic without a message")
        raise PanicError(line if told is None else f"{told}: {line}") from error


@contextmanager
def unprinted_panics() -> Iterator[None]:
    """Keep what Rust itself prints of a panic from stderr, where a `with` block ends with an error that tells it.

    Everything else that is printed there appears at the end of the block. For short work in the main thread.
    """
    try:
        stderr, held = os.dup(2), os.memfd_create("stderr")
    except (OSError, AttributeError):  # it is closed; or the system is not Linux
        yield
        return
    os.dup2(held, 2)
    is_over = False
    try:
        yield
        is_over = True
    finally:
        os.dup2(stderr, 2)
        printed = os.pread(held, os.fstat(held).st_size, 0)
        panic = None if is_over else _BEGINNING.search(printed)
        with suppress(OSError):
            os.write(2, printed if panic is None else printed[: panic.start()])
        os.close(stderr)
        os.close(held)
