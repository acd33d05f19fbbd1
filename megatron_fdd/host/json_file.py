"""JSON files with one object, in the form that Hugging Face writes; and dataclasses that such files hold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# A tokenizer of a million words has 100 MB. What is longer would only fill the memory.
_MOST_BYTES = 1 << 30


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. ValueError names the file if it is missing, no regular file, malformed or not an object."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no regular file; copy or make it again")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes, more than any file of its kind; make it again"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; copy or make it again") from None
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} must hold a JSON object, not a {type(value).__name__}; copy or make it again"
        )
    return value


def parse_json(text: str, where: Path | str) -> Any:
    """Return a JSON text as Python values.

    Raises:
        ValueError: the text is malformed, nested too deeply, or has an integer with thousands of digits; names `where`.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}; copy or make it again") from None
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: nested too deeply; copy or make it again") from None
    except ValueError:  # Python's own message names a Python function
        raise ValueError(
            f"{where} is not valid JSON: an integer with thousands of digits; copy or make it again"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON as Hugging Face does: two spaces, keys in their given order, a line break at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record[T](kind: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass from the values of a JSON object.

    Raises:
        ValueError: names the first field that is missing, unknown, or of another type than the dataclass says.
    """
    assert dataclasses.is_dataclass(kind)
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in values and dataclasses.MISSING is field.default is field.default_factory:
            raise ValueError(f'"{field.name}" is missing')
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f'"{name}" is not known')
        if not _fits(value, hints[name]):
            raise ValueError(f'"{name}" is {value!r:.60}, which is of the wrong kind')
    return kind(**values)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value of a JSON file has the type of an annotation; true and false are no numbers."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(each, arguments[0]) for each in value)
    if origin is not None:  # a mapping
        return isinstance(value, origin) and all(_fits(each, arguments[1]) for each in value.values())
    if hint is Any:
        return True
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))
