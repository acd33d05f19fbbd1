"""Dataclasses out of JSON files: what does not fit is named before anything uses it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_fdd.host.json_file import read_json, read_record


@dataclass(frozen=True)
class Record:
    kind: Literal["a", "b"]
    count: int
    words: dict[str, int]
    end: str | None = None
    more: Mapping[str, Any] | None = None
    rest: list[str] = field(default_factory=list)


RIGHT: dict[str, Any] = {"kind": "a", "count": 2, "words": {"x": 1}}


def test_what_fits_is_taken() -> None:
    assert read_record(Record, RIGHT) == Record("a", 2, {"x": 1})
    more = {"end": "e", "more": {"y": [1, None]}}
    assert read_record(Record, {**RIGHT, **more}) == Record("a", 2, {"x": 1}, **more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "c"}, "\"kind\" is 'c', which is of the wrong kind"),
        ({"kind": ["a"]}, "\"kind\" is ['a']"),
        ({"count": "2"}, "\"count\" is '2'"),
        ({"count": 2.0}, '"count" is 2.0'),
        ({"count": True}, '"count" is True'),
        ({"count": None}, '"count" is None'),
        ({"words": [1]}, '"words" is [1]'),
        ({"words": {"x": "1"}}, "\"words\" is {'x': '1'}"),
        ({"end": 3}, '"end" is 3'),
        ({"more": 3}, '"more" is 3'),
        ({"other": 3}, '"other" is not known'),
        ({"count": "long" * 99}, '"count" is \'longlong'),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        read_record(Record, {**RIGHT, **changes})
    assert len(str(error.value)) < 110


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match='^"words" is missing$'):
        read_record(Record, {"kind": "a", "count": 2})


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zeros.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zeros.json"):
        with pytest.raises(ValueError, match=rf"{name} is no regular file; copy or make it again"):
            read_json(tmp_path / name)


def test_a_file_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "long.json").open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(
        ValueError, match=r"long\.json has 1,073,741,825 bytes, more than any file of its kind"
    ):
        read_json(tmp_path / "long.json")
