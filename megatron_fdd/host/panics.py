"""Panics of libraries in Rust, such as tokenizers, which arrive as a BaseException, past every `except Exception`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# Rust prints a panic itself, and with this set to 1, as some images have it, a hundred lines more. It looks only once.
os.environ["RUST_BACKTRACE"] = "0"


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
