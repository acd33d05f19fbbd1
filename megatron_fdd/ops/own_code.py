"""Functions that a plug-in brings, called and looked at so that an error names them."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any


def called(what: str, function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function that a plug-in brings, and return its result.

    Args:
        what: names the function in the error.

    Raises:
        ValueError: it raises, or would end the process; with its error, and the place.
    """
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        raise ValueError(
            f"{what} fails with {type(error).__name__}: {text} ({place.filename}, line {place.lineno}); correct it"
        ) from error


def takes(function: object, *arguments: object) -> bool:
    """Whether something is a function that can be called with as many arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a built-in one, whose signature nobody knows
        return True
    return True
