"""What a record may hold: JSON that every reader understands alike, and texts that every tokenizer takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_fdd.data.refusals import Fault, Reason

Fields = Mapping[str, Any]


def parse_json(text: str) -> object:
    """Return a JSON text as Python values; strict: no field twice in an object, no NaN.

    Raises:
        Fault: the text is malformed; says where.
        RecursionError: the JSON is nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} of it, " if error.lineno > 1 else ""
        raise Fault(f"malformed JSON ({error.msg}, {line}column {error.colno})") from error
    except Fault:
        raise
    except ValueError as error:  # Python's own message about long integers names a Python function
        raise Fault("an integer with thousands of digits") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Fault(f"has the field {twice!r} twice")
    return found


def _refuse_constant(name: str) -> object:
    raise Fault(f"holds {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def check_text(text: str) -> None:
    """Refuse characters that UTF-8 cannot encode, and NUL, which some tokenizers take for the end of a text.

    Raises:
        Fault: names the character.
    """
    if "\0" in text:
        raise Fault(f"holds a NUL (character {text.index(chr(0)) + 1})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise Fault(
            f"holds half of a surrogate pair (\\u{code:04x}, character {error.start + 1}), which is not text"
        ) from error


def check_values(value: object) -> None:
    """Refuse parsed JSON that cannot be written again: texts that `check_text` refuses, and infinite numbers.

    Raises:
        Fault: names the character or the number.
    """
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            check_text(part)
        elif isinstance(part, dict):
            left += part
            left += part.values()
        elif isinstance(part, list):
            left += part
        elif isinstance(part, float) and not math.isfinite(part):
            raise Fault("holds a number that is too large")


def text_field(fields: Fields, key: str) -> str:
    """Return a field that must be present and must be a text.

    Raises:
        Fault: the field is missing or not a text, or has characters that no tokenizer takes.
    """
    if key not in fields:
        raise Fault(f"the field {key!r} is missing; the record has {sorted(fields)}", Reason.FIELDS)
    value = fields[key]
    if not isinstance(value, str):
        raise Fault(f"the field {key!r} is a {type(value).__name__}, not a text")
    try:
        check_text(value)
    except Fault as error:
        raise Fault(f"the field {key!r} {error}") from error
    return value
