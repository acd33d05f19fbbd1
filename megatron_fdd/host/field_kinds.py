"""What a value out of a file may be: its type and its range, as a test and in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_LONGEST_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be.

    Attributes:
        words: for a message, such as "a whole number from 1 to 10,000".
        fits: whether a value is of this kind; it takes any value and raises nothing.
    """

    words: str
    fits: Callable[[Any], bool]


def whole(least: int, most: int) -> Kind:
    """Return the kind of whole numbers within bounds; true, false, 4.0 and "4" are none."""
    return Kind(
        f"a whole number from {least:,} to {most:,}",
        lambda value: type(value) is int and least <= value <= most,
    )


def number(least: float, most: float) -> Kind:
    """Return the kind of finite numbers within bounds."""
    return Kind(
        f"a number from {least:,} to {most:,}",
        lambda value: type(value) in (int, float) and least <= value <= most,
    )


def above_zero(most: float) -> Kind:
    """Return the kind of finite numbers above 0, up to a bound."""
    return Kind(
        f"a number above 0, at most {most:,}",
        lambda value: type(value) in (int, float) and 0 < value <= most,
    )


FLAG = Kind("true or false", lambda value: type(value) is bool)
ZERO_OR_ONE = Kind("0 or 1", lambda value: type(value) in (int, bool) and value in (0, 1))
TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict) and all(isinstance(k, str) for k in value))


def one_of(*words: str) -> Kind:
    """Return the kind of these texts."""
    return Kind(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


def optional(kind: Kind) -> Kind:
    """Return the same kind, or null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.fits(value))


def list_of(kind: Kind) -> Kind:
    """Return the kind of lists and tuples of such values."""
    return Kind(
        f"a list, each {kind.words}",
        lambda value: isinstance(value, list | tuple) and all(map(kind.fits, value)),
    )


def object_of(kind: Kind) -> Kind:
    """Return the kind of objects all of whose values are such."""
    return Kind(
        f"an object, each value {kind.words}",
        lambda value: OBJECT.fits(value) and all(map(kind.fits, value.values())),
    )


def either(first: Kind, second: Kind) -> Kind:
    """Return the kind of values that are of one or the other."""
    return Kind(f"{first.words} or {second.words}", lambda value: first.fits(value) or second.fits(value))


def wrong_field(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> tuple[str, Any, str] | None:
    """Return name, value and allowed kind of the first field that is of another kind; None if all fit.

    Fields that are absent, or that have no kind, are left alone.
    """
    for name, kind in kinds.items():
        if name in values and not kind.fits(values[name]):
            return name, values[name], kind.words
    return None


def shown(value: object) -> str:
    """Return a value for a message, whatever it is; a long one is cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits; nested too deeply
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 4]} ..."
