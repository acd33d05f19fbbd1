"""Random changes of valid inputs: of JSON values, of texts, of bytes. All are functions of a random generator."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 10**4, 10**5 + 1, 10**8, 2**31, 2**63, 2**70, 10**400, 0.5, -0.0, 4.0, 1e-9,
    1e308, math.nan, math.inf, -math.inf, "", "0", "4", "1e-5", "false", "null", "\0", "\ud800", "\u00b2", "x" * 300,
    "../x", "/etc/passwd", ".", "{{ 1/0 }}", [], [1], ["a"], [[]], [None], {}, {"a": 1}, {"": None}, {"content": "a"},
)  # fmt: skip
NUMBERS = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
DEEP = '{"a":[' * 20_000


def json_value(rng: random.Random, value: Any) -> Any:
    """Return a copy of a JSON value with one to three parts of it changed."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return rng.choice(HOSTILE)
        holder, key = rng.choice(places)
        _change(rng, holder, key)
    return changed


def _places(value: Any) -> Any:
    """Yield (container, key) of every part of a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _change(rng: random.Random, holder: Any, key: Any) -> None:
    kind = rng.random()
    if kind < 0.7:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    elif kind < 0.8 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice((-1, 0, 2, 10, 1000, 10**6))
    elif kind < 0.9:
        del holder[key]
    elif isinstance(holder, dict):
        other = rng.choice(list(holder))
        holder[key] = copy.deepcopy(holder[other])
    else:
        holder.insert(key, copy.deepcopy(rng.choice(HOSTILE)))


def json_text(rng: random.Random, value: Any) -> str:
    """Return a changed JSON value as text; sometimes the text is changed instead."""
    if rng.random() < 0.85:
        return json.dumps(json_value(rng, value))
    written = json.dumps(value)
    kind = rng.randrange(4)
    if kind == 0:
        return text(rng, written)
    if kind == 1:
        return written.replace("1", "1" * 5000, 1)
    start = rng.randrange(len(written))
    return written[:start] + (DEEP if kind == 2 else '"a":1,"a":2,') + written[start:]


def text(rng: random.Random, value: str) -> str:
    """Return a text with a part cut, doubled or replaced."""
    start, end = sorted(rng.randrange(len(value) + 1) for _ in range(2))
    end = min(end, start + 40)
    part = rng.choice(
        ("", value[start:end] * 2, '"', "}", "\0", "\ud83d", "\u2028", "%}", "{{", "9" * 30, "\n")
    )
    return value[:start] + part + value[end:]


def raw(rng: random.Random, value: bytes) -> bytes:
    """Return bytes with bits flipped, numbers replaced, or parts cut or doubled."""
    changed = bytearray(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(changed)) if changed else 0
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) % 256**width
            changed[place : place + width] = number.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            del changed[place : place + rng.randrange(1, 64)]
        elif kind == 4:
            changed[place:place] = changed[place : place + rng.randrange(1, 64)]
        else:
            changed[place : place + 8] = bytes(rng.randrange(256) for _ in range(8))
    return bytes(changed)
