"""Conversion of Megatron's errors about a wrong flag or file into a ValueError."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator


@contextlib.contextmanager
def megatrons_errors(what: str) -> Iterator[None]:
    """Raise a ValueError in place of Megatron's errors in a `with` block about `what`."""
    try:
        yield
    except (AssertionError, ValueError, OSError) as error:
        raise ValueError(f"Megatron refuses {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the message; without one, the condition that Megatron asserts, as in its source (0.19.2)."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    missing = re.fullmatch(r"assert args\.(\w+) is not None,?", line.strip())
    if missing and not str(error):
        return f"--{missing[1].replace('_', '-')} is missing"
    return str(error) or f"needed is {line.removeprefix('assert ')}"
