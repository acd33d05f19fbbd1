"""Dataclasses whose fields are flags: one description makes the parser, --help, docs/flags.md and the checks."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_fdd.host.plugins import REMEDY


@dataclass(frozen=True, slots=True)
class Bound:
    """The bound of a number, in words and as a test."""

    text: str
    holds: Callable[[float], bool]


@dataclass(frozen=True, slots=True)
class Flag:
    """The description of a field's flag; the field itself gives its name, type, default and closed set of choices.

    Attributes:
        text: the text in --help and docs/flags.md.
        group: the title in --help of the flags from here on.
        metavar: the name of the value in --help.
        choices: returns the names of an open set, to which plug-ins add; a mapping also explains each name. It is
            called when the parser is made. A closed set is the field's `Literal`.
        read: makes the field's value from the command line's. Raises ValueError.
        bound: the bound of a number.
        takes_words: several words stand behind the flag; the default is ().
    """

    text: str
    group: str | None = None
    metavar: str | None = None
    choices: Callable[[], Collection[str]] | None = None
    read: Callable[[Any], Any] | None = None
    bound: Bound | None = None
    takes_words: bool = False


def flag[T](default: T, text: str, **more: Any) -> T:
    """Make a field with a flag; `more` are attributes of `Flag`."""
    return dataclasses.field(default=default, metadata={"flag": Flag(text, **more)})


# Flags of a teacher that does not run.
_OF_THE_STORE = ("teacher_store", "teacher_follow", "teacher_wait")


def dest(field_name: str) -> str:
    """Return a field's name in the parsed command line; with dashes it is the name of its flag.

    A flag of the live teacher has its own name, as Megatron's flags have.
    """
    is_own = field_name.startswith("teacher_") and field_name not in _OF_THE_STORE
    return field_name if is_own else f"fdd_{field_name}"


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add the flag of each field of the dataclass `config`, whose fields are all made by `flag`."""
    types = get_type_hints(config)
    group: argparse._ActionsContainer = parser
    for field, about in _flags(config):
        if about.group is not None:
            group = parser.add_argument_group(about.group)
        group.add_argument(_option(field.name), **_keywords(types[field.name], field.default, about))


def read_flags(config: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return the value of each field of `config` in a parsed command line.

    Raises:
        ValueError: `Flag.read` refuses a value.
    """
    values = {}
    for field, about in _flags(config):
        value = getattr(args, dest(field.name))
        if about.read is not None:
            value = about.read(value)
        elif field.default == ():
            value = tuple(value or ())
        values[field.name] = value
    return values


def check_bounds(config: Any) -> None:
    """Refuse a field of a dataclass of flags that is outside its bound or no known name; None is always allowed.

    Raises:
        ValueError: names the flag, the value and the bound.
    """
    for field, about in _flags(type(config)):
        value = getattr(config, field.name)
        if about.bound is not None and value is not None and not about.bound.holds(value):
            raise ValueError(f"{_option(field.name)} {value}: must be {about.bound.text}")
        if about.choices is not None and value not in about.choices():
            raise ValueError(f"{_option(field.name)} {none_of(value, about.choices())}")


def _flags(config: type) -> Iterator[tuple[dataclasses.Field[Any], Flag]]:
    return ((field, field.metadata["flag"]) for field in dataclasses.fields(config))


def _option(field_name: str) -> str:
    return f"--{dest(field_name).replace('_', '-')}"


def _keywords(annotation: Any, default: object, about: Flag) -> dict[str, Any]:
    """Describe a flag to argparse: a switch for a bool, else a value of the field's type, with its default in the text.

    A field whose default is () takes a value each time that its flag is given, or several words at once.
    """
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = set(get_args(annotation)) - {NoneType}
    names = () if about.choices is None else about.choices()
    said = [f"{name}: {meaning}" for name, meaning in names.items()] if isinstance(names, Mapping) else []
    text = "; ".join([about.text, *said]).replace("%", "%%")
    if annotation is bool:
        return {"action": "store_true", "help": text}
    if about.takes_words:
        return {"nargs": "+", "metavar": about.metavar, "help": text}
    if default == ():
        return {"action": "append", "metavar": about.metavar, "help": text}
    keywords = {"default": default, "metavar": about.metavar, "help": text}
    if default is not None:
        keywords["help"] = f"{text} (%(default)s)"
    if annotation in (int, float):
        keywords["type"] = annotation
    elif get_origin(annotation) is Literal:
        keywords["choices"] = get_args(annotation)
    elif names:
        keywords |= {"choices": tuple(names), "type": partial(_known, tuple(names))}
    return keywords


def _known(names: Sequence[str], name: str) -> str:
    if name not in names:
        raise argparse.ArgumentTypeError(none_of(name, names))
    return name


def none_of(name: str, names: Collection[str]) -> str:
    """Return the message that a name is not in an open set."""
    return f"{name!r} is none of {', '.join(names)}; {REMEDY}"
