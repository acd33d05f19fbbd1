"""The records of files: JSON lines, the objects of JSON arrays, and the rows of parquet as JSON."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

from megatron_fdd.data.streams import START_BYTES, Stream, pyarrow_for

Unit = Literal["line", "element", "row"]
# A record's number (from 1), its bytes, and how many bytes of the file were read for it.
Record = tuple[int, bytes, int]
# The largest length of one element of an array.
_MAX_ELEMENT = 256 * 1024 * 1024
_CHUNK = 1024 * 1024
_ROWS_AT_A_TIME = 256
_BLANKS = re.compile(r"[ \t\r\n]*")
# Below these keys of a schema, null is a value.
_NULL_MEANS_NULL = ("enum", "const", "default")


def json_unit(stream: Stream) -> Unit:
    """Return what one record of a JSON or parquet file is.

    Raises:
        ValueError: the file is neither.
    """
    if stream.is_parquet:
        return "row"
    head, _ = stream.head(START_BYTES)
    return "element" if head.lstrip()[:1] == b"[" else "line"


def read_records(stream: Stream, unit: Unit) -> Iterator[Record]:
    """Yield every record in order; blank lines are skipped.

    Raises:
        ValueError: the file as a whole cannot be read, for example because it is damaged.
    """
    if unit == "row":
        return _rows(stream.path)
    return _elements(stream) if unit == "element" else _lines(stream)


def _lines(stream: Stream) -> Iterator[Record]:
    for number, line in enumerate(stream.bytes, 1):
        if content := line.strip():
            yield number, content, stream.share(len(line))


class _Window:
    """A part of a stream's text, beginning where it is read.

    Bytes that are not UTF-8 come back unchanged.
    """

    def __init__(self, stream: Stream) -> None:
        self._bytes = stream.bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text = ""
        self.start = 0

    def more(self) -> bool:
        """Read at least as much text again; return false at the end."""
        chunk = self._bytes.read(max(_CHUNK, len(self.text) - self.start))
        self.text = self.text[self.start :] + self._decode(chunk, not chunk)
        self.start = 0
        return bool(chunk)

    def next_character(self) -> str:
        """Return the next character that is not blank; "" at the end."""
        while True:
            match = _BLANKS.match(self.text, self.start)
            assert match is not None
            self.start = match.end()
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.more():
                return ""


def _elements(stream: Stream) -> Iterator[Record]:
    """Yield the objects of an array, which is never in memory as a whole."""
    window = _Window(stream)
    number = 0
    if window.next_character() == "[":
        window.start += 1
    while (character := window.next_character()) != "]":
        if number and character == ",":
            window.start += 1
            character = window.next_character()
        elif number:
            raise _no_array(stream, number, "a comma or the closing bracket is missing after it")
        number += 1
        if character != "{":
            raise _no_array(stream, number, "it must be an object")
        content = _element(window, stream, number).encode("utf-8", "surrogateescape")
        yield number, content, stream.share(len(content) + 1)
    window.start += 1
    if window.next_character():
        raise _no_array(stream, number, "something follows the array; where each line is one, write objects")


def _element(window: _Window, stream: Stream, number: int) -> str:
    while True:
        try:
            _, end = _BORDERS.raw_decode(window.text, window.start)
        except RecursionError as error:
            raise _no_array(stream, number, "it is nested too deeply") from error
        except json.JSONDecodeError as error:
            # A record that reaches beyond the window fails at the window's end, or in a text that begins there.
            is_cut = error.pos >= len(window.text) - 16 or error.msg.startswith("Unterminated string")
            length = len(window.text) - window.start
            if not is_cut or length > _MAX_ELEMENT or not window.more():
                raise _no_array(stream, number, f"malformed JSON ({error.msg})") from error
            continue
        element = window.text[window.start : end]
        window.start = end
        return element


def _no_array(stream: Stream, number: int, detail: str) -> ValueError:
    return ValueError(
        f"{stream.path}, element {number}: {detail}; mend it, or write JSON lines (jq -c '.[]' in.json > out.jsonl)"
    )


# Finds where an element ends; its content is parsed later, and more strictly.
_BORDERS = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len, strict=False)


def _rows(path: str) -> Iterator[Record]:
    """Yield the rows of a parquet file as JSON, a few in memory at a time."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: parquet cannot be read from a pipe; give the file")
    pyarrow_for(path, "parquet")
    from pyarrow.parquet import ParquetFile

    size, number, taken = os.path.getsize(path), 0, 0
    try:
        with ParquetFile(path, buffer_size=_CHUNK, pre_buffer=False) as file:
            for batch in file.iter_batches(_ROWS_AT_A_TIME):
                for row in batch.to_pylist():
                    number += 1
                    before, taken = taken, size * number // file.metadata.num_rows
                    yield number, _row_json(row), taken - before
    except (OSError, ValueError) as error:  # Arrow's errors, and UnicodeDecodeError
        raise ValueError(f"{path}, after row {number}: damaged ({error}); make or copy it again") from error


def _row_json(row: dict[str, Any]) -> bytes:
    fields = {name: without_nulls(value) for name, value in row.items()}
    try:
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        text = json.dumps(_without_nan(fields), ensure_ascii=False, default=_plain)
    return text.encode("utf-8")


def without_nulls(value: Any) -> Any:
    """Return a value without the fields of its objects that are null.

    Arrow gives every object of a column all fields of the column, null where the object had none. A null of the
    original JSON looks the same and is dropped too. It stays in lists, and as a value in a schema.
    """
    if isinstance(value, dict):
        return {
            key: part if key in _NULL_MEANS_NULL else without_nulls(part)
            for key, part in value.items()
            if part is not None
        }
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def _without_nan(value: Any) -> Any:
    """Replace NaN by null; pandas writes null among numbers as NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: object) -> object:
    """Return a value that JSON can hold in place of one it cannot, such as a date.

    Bytes that are not text become an object, which no field takes for a text.
    """
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"bytes": len(value)}
