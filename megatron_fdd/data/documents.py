"""Documents of raw files: which format a file has, and where each document starts."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from megatron_fdd.data.conversations import CHOSEN, conversation_layouts, is_conversation
from megatron_fdd.data.instructions import find_layout
from megatron_fdd.data.readers import Unit, json_unit, read_records
from megatron_fdd.data.records import parse_json, text_field
from megatron_fdd.data.refusals import Fault, Reason, Refusal, refusing
from megatron_fdd.data.streams import HEAD_BYTES, START_BYTES, Stream, look, open_stream

DocumentFormat = Literal["text", "jsonl", "instruction"]
# The two `document_separator` values with a meaning of their own; anything else is the separating line.
WHOLE_FILE = "file"
BLANK_LINE = "blank-line"
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines")
_SUFFIXES = (*_JSON_SUFFIXES, ".parquet", ".txt")
_COMPRESSED = (".gz", ".zst", ".zstd")
# Tables, and the files that datasets' save_to_disk writes.
_TABLES = {
    ".csv": "a table: write it as JSON lines or parquet (pandas: to_json with orient='records' and lines=True)",
    ".tsv": "a table: write it as JSON lines or parquet (pandas: to_json with orient='records' and lines=True)",
    ".arrow": "an Arrow file: write it as parquet (datasets: load_from_disk, then to_parquet)",
}
# Files of a data folder that hold no data.
_NOTES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
# The beginning of a file that is JSON, not text.
_BEGINS_JSON = re.compile(rb"\s*(\[\s*)?\{\s*[\"}]")
# How many of a file's first records are tried in search of a well-formed one that shows the format.
_TRIED = 100


@dataclass(frozen=True, slots=True)
class RawDocument:
    """One document as it stands in a file.

    Attributes:
        source: the path of the file.
        number: the number of its first line, of its array element, or of its table row; from 1.
        content: its bytes, not yet decoded (the workers do that); a row's bytes are those of a JSON object.
        num_bytes: how many bytes of the file on disk were read for it, separators included.
        unit: what `number` counts.
    """

    source: str
    number: int
    content: bytes
    num_bytes: int
    unit: Unit = "line"

    @property
    def where(self) -> str:
        """The place of the document, for messages: file, and line, element or row."""
        return f"{self.source}, {self.unit} {self.number}"

    def text(self) -> str:
        """Return the decoded content.

        Raises:
            Refusal: the content is not UTF-8, or has bytes that no text has; names file and line.
        """
        at = self.content.find(b"\0")
        detail = "byte 0x00 is in no text; is the file UTF-16, or no text at all?"
        if at < 0:
            try:
                return self.content.decode("utf-8")
            except UnicodeDecodeError as error:
                at = error.start
                detail = f"byte 0x{self.content[at]:02x} is not UTF-8; convert the file to UTF-8 first"
        line = self.number + (self.content[:at].count(b"\n") if self.unit == "line" else 0)
        raise Refusal(f"{self.source}, {self.unit} {line}", Reason.MALFORMED, detail)

    def json_object(self) -> dict[str, object]:
        """Return the content as one JSON object.

        Raises:
            Refusal: the JSON is malformed or of another type; names file and line.
        """
        with refusing(self.where):
            value = parse_json(self.text())
            if not isinstance(value, dict):
                raise Fault(f"a JSON {type(value).__name__}, not an object")
            return value

    def text_field(self, fields: dict[str, object], key: str) -> str:
        """Return one of the fields of `json_object`.

        Raises:
            Refusal: the field is missing or not a text; names file and line.
        """
        with refusing(self.where):
            return text_field(fields, key)


@dataclass(frozen=True, slots=True)
class JsonKeys:
    """The field names that a JSON file uses.

    The fields of chats have fixed names. The response may also be `chosen`, a chat.
    """

    text: str = "text"
    prompt: str = "prompt"
    response: str = "response"


def expand_inputs(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the files that are meant: each path, or for a folder all data below it, sorted by name.

    Raises:
        ValueError: a path does not exist, or a folder has no data.
    """
    found: list[str] = []
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"input file {path} does not exist; give another path")
        found += _files_below(path) if os.path.isdir(path) else [path]
    return tuple(found)


def _files_below(folder: str) -> list[str]:
    """Return the data files below a folder, without hidden files and folders."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    data = [path for path in found if _suffix(path) in _SUFFIXES and os.path.basename(path) not in _NOTES]
    if not data:
        table = next((path for path in sorted(found) if _suffix(path) in _TABLES), None)
        cause = f"{table} is {_TABLES[_suffix(table)]}" if table else "it has no file with a known suffix"
        raise ValueError(
            f"no data in the folder {folder}: {cause}; names must end in {', '.join(_SUFFIXES)} (.gz, .zst)"
        )
    return sorted(data)


def _suffix(path: str) -> str:
    """Return the suffix that tells the format, in lower case and without the suffix of a compression."""
    root, suffix = os.path.splitext(path.lower())
    return os.path.splitext(root)[1] if suffix in _COMPRESSED else suffix


def detect_format(paths: Iterable[str], keys: JsonKeys, *, has_template: bool = False) -> DocumentFormat:
    """Return the one format of all files, by their first bytes and the fields of their first record.

    With a template, records in the layouts of `instructions.LAYOUTS` are instructions too.

    Raises:
        ValueError: the files differ in format; or a file is not data, or its first record has no known field.
    """
    formats: dict[DocumentFormat, str] = {}
    for path in paths:
        formats.setdefault(_detect_file_format(path, keys, has_template), path)
    if len(formats) > 1:
        found = ", ".join(f"{path} is {name}" for name, path in formats.items())
        raise ValueError(f"input files of different formats ({found}); prepare them one format at a time")
    if not formats:
        raise ValueError("no input file; name at least one with --input")
    return next(iter(formats))


def _detect_file_format(path: str, keys: JsonKeys, has_template: bool) -> DocumentFormat:
    if _suffix(path) in _TABLES:
        raise ValueError(
            f"{path} is {_TABLES[_suffix(path)]}; or give --format text, if it is to be read as text"
        )
    with look(path) as stream:
        is_json = stream.is_parquet or _suffix(path) in _JSON_SUFFIXES
        if not is_json and not _BEGINS_JSON.match(stream.head(START_BYTES)[0]):
            return "text"
        first, fields = _first_record(stream)
    if is_conversation(fields, keys.response) or {keys.prompt, keys.response} <= fields.keys():
        return "instruction"
    layout = find_layout(fields)
    if has_template and layout is not None:
        return "instruction"
    if keys.text in fields:
        return "jsonl"
    remedy = f"; or give --template alpaca, which reads this layout ({layout})" if layout else ""
    if CHOSEN in fields:
        remedy += f"; or give --response-key {CHOSEN}, to learn the better answers"
    raise ValueError(
        f"{first.where}: has the fields {sorted(fields)}, none of which is known; name them with --json-key (text), or "
        f"--prompt-key and --response-key (instructions); a chat has {conversation_layouts()}{remedy}"
    )


def _first_record(stream: Stream) -> tuple[RawDocument, dict[str, object]]:
    """Return the first well-formed record, from the head of the file alone.

    Raises:
        ValueError: the head of the file has no such record.
    """
    unit = json_unit(stream)
    source, is_whole = stream, True
    if unit != "row":
        head, is_whole = stream.head(HEAD_BYTES)
        source = Stream(stream.path, io.BytesIO(head if is_whole else head[: head.rfind(b"\n") + 1]))
    refusal: Refusal | None = None
    for record in islice(read_records(source, unit), _TRIED):
        document = RawDocument(stream.path, *record, unit)
        try:
            return document, document.json_object()
        except Refusal as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    if is_whole:
        raise ValueError(f"{stream.path} is empty; remove it from --input")
    raise ValueError(f"{stream.path}: its first record is very long; say with --format what it is")


def read_documents(
    paths: Iterable[str], document_format: DocumentFormat, separator: str
) -> Iterator[RawDocument]:
    """Yield every document of the files, in order, empty ones included.

    JSON: each line, array element or parquet row is one document. Text: `separator` is "file" (a file is one
    document), "blank-line" (one or more blank lines end a document), or any other string (a line that equals it
    ends a document).

    Raises:
        ValueError: a file as a whole cannot be read; names the file.
    """
    for path in paths:
        with open_stream(path) as stream:
            if document_format != "text":
                unit = json_unit(stream)
                for number, content, num_bytes in read_records(stream, unit):
                    yield RawDocument(path, number, content, num_bytes, unit)
            else:
                yield from _read_text(stream, separator)


def _read_text(stream: Stream, separator: str) -> Iterator[RawDocument]:
    if stream.is_parquet:
        raise ValueError(f"{stream.path} is parquet, which is not text; leave out --format text")
    stream.head(START_BYTES)  # refuses what is not text
    if separator == WHOLE_FILE:
        content = stream.bytes.read()
        yield RawDocument(stream.path, 1, content, stream.share(len(content)))
    else:
        yield from _read_separated(stream, separator.encode())


def _read_separated(stream: Stream, separator: bytes) -> Iterator[RawDocument]:
    separator = b"" if separator == BLANK_LINE.encode() else separator.strip()
    lines: list[bytes] = []
    start, consumed = 1, 0
    for number, line in enumerate(stream.bytes, 1):
        consumed += stream.share(len(line))
        if line.strip() != separator:
            start = number if not lines else start
            lines.append(line)
        elif lines:
            yield RawDocument(stream.path, start, b"".join(lines).strip(b"\r\n"), consumed)
            lines, consumed = [], 0
    if lines:
        yield RawDocument(stream.path, start, b"".join(lines).strip(b"\r\n"), consumed)


def input_bytes(paths: Iterable[str]) -> int:
    """Return the total size of the input files on disk.

    Raises:
        ValueError: a file is missing or is a folder.
    """
    total = 0
    for path in paths:
        if not os.path.exists(path) or os.path.isdir(path):
            fault = "is a folder; name the files in it" if os.path.isdir(path) else "does not exist"
            raise ValueError(f"input file {path} {fault}")
        total += os.path.getsize(path)
    return total
