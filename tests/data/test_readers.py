"""Records of files of every kind: recognised by content, numbered, and refused with their place."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.data import readers
from megatron_fdd.data.documents import JsonKeys, RawDocument, detect_format, read_documents
from megatron_fdd.data.refusals import Reason, Refusal
from megatron_fdd.evaluate.data_file import Selection, read_data_file

RECORDS: list[dict[str, Any]] = [
    {"text": "the river é 川 😀", "more": None},
    {"text": 'a "b" \\ ] } ,', "more": None},
    {"text": "c", "more": [{"d": "[{"}]},
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1, ensure_ascii=False).encode()


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(content, "zstd", asbytes=True)


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    return path


def documents(path: Path) -> list[RawDocument]:
    return list(read_documents([str(path)], "jsonl", ""))


def write(path: Path, kind: str) -> Path:
    if kind == "parquet":
        return write_parquet(path, RECORDS)
    pack: Callable[[bytes], bytes] = {"gzip": gzip.compress, "zstd": zstd}.get(kind.split()[-1], bytes)
    path.write_bytes(pack(ARRAY if "array" in kind else LINES))
    return path


@pytest.mark.parametrize(
    "kind", ["lines", "array", "lines gzip", "array gzip", "lines zstd", "array zstd", "parquet"]
)
def test_records_are_the_same_whatever_the_file(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "no-suffix", kind)
    assert detect_format([str(path)], JsonKeys()) == "jsonl"
    found = documents(path)
    assert [document.json_object() for document in found] == RECORDS
    unit = {"l": "line", "a": "element", "p": "row"}[kind[0]]
    assert [document.where for document in found] == [f"{path}, {unit} {number}" for number in (1, 2, 3)]
    size = path.stat().st_size
    assert size // 2 < sum(document.num_bytes for document in found) <= size


def test_several_streams_in_a_file_are_one(tmp_path: Path) -> None:
    for pack in (gzip.compress, zstd):
        (tmp_path / "a.jsonl.x").write_bytes(pack(LINES) + pack(LINES))
        assert len(documents(tmp_path / "a.jsonl.x")) == 6


@pytest.mark.parametrize("kind", ["array", "lines gzip", "parquet"])
def test_evaluation_reads_them_too(tmp_path: Path, kind: str) -> None:
    rows = [{"instruction": "a", "context": "", "response": "b"}] * 3
    path = tmp_path / "dolly"
    if kind == "parquet":
        write_parquet(path, rows)
    else:
        lines = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(json.dumps(rows).encode() if kind == "array" else gzip.compress(lines))
    data = read_data_file("x", path, Selection())
    assert (data.layout, len(data.examples)) == ("dolly", 3)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_arrays_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    for content in (ARRAY, b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(), b" [] ", b"[\n]"):
        (tmp_path / "a.json").write_bytes(content)
        expected = [] if len(content) < 9 else RECORDS
        assert [document.json_object() for document in documents(tmp_path / "a.json")] == expected


@pytest.mark.parametrize("kind", ["array", "lines gzip"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    record = json.dumps({"text": "the river " * 1000})
    path = tmp_path / "a.json"
    if kind == "array":
        path.write_text("[" + ",".join([record] * 3000) + "]")
    else:
        path.write_bytes(gzip.compress((record + "\n").encode() * 3000, 1))
    tracemalloc.start()
    num_bytes = sum(len(document.content) for document in read_documents([str(path)], "jsonl", ""))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_bytes > 30_000_000
    assert peak < 14_000_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"} {"text": "b"}]', "element 1: a comma or the closing bracket is missing"),
        ('[{"text": "a"}', "element 1: a comma or the closing bracket is missing"),
        ('[{"text": "a"},]', "element 2: it must be an object"),
        ("[", "element 1: it must be an object"),
        ('[{"text": "a"}, "b"]', "element 2: it must be an object"),
        ('[{"text": "a"}, {"text": b}]', "element 2: malformed JSON"),
        ('[{"text": "a"}, {"text": "b]', "element 2: malformed JSON .*Unterminated"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "element 1: something follows the array"),
        ('[{"text": ' + "[" * 100_000, "element 1: it is nested too deeply"),
    ],
)
def test_malformed_arrays(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json, {message}.*jq -c"):
        documents(tmp_path / "a.json")


def test_a_huge_element_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_CHUNK", 10)
    monkeypatch.setattr(readers, "_MAX_ELEMENT", 100)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 50}, {"text": "x" * 500}]))
    with pytest.raises(ValueError, match=r"element 2: malformed JSON .*jq -c"):
        documents(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b'{"text": "\xff"}', "byte 0xff is not UTF-8"),
        (b'{"text": "a\0"}', "byte 0x00 is in no text"),
        (b'{"text": NaN}', "holds NaN"),
        (b'{"text": -Infinity}', "holds -Infinity"),
        (b'{"text": "a", "x": {"b": 1, "c": 2, "b": 3}}', "has the field 'b' twice"),
        (b'{"text": ' + b"7" * 5000 + b"}", "an integer with thousands of digits"),
    ],
)
@pytest.mark.parametrize("unit", ["line", "element"])
def test_one_record_is_refused_alone(tmp_path: Path, record: bytes, message: str, unit: str) -> None:
    good = b'{"text": "a"}'
    content = (
        b"\n".join((good, record, good)) if unit == "line" else b"[" + b",".join((good, record, good)) + b"]"
    )
    (tmp_path / "a.json").write_bytes(content)
    first, bad, last = documents(tmp_path / "a.json")
    assert first.json_object() == last.json_object() == {"text": "a"}
    with pytest.raises(Refusal, match=rf"a\.json, {unit} 2: {message}") as refusal:
        bad.json_object()
    assert refusal.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ('{"text": "a" "b"}', r"malformed JSON \(Expecting ',' delimiter, column 14\)"),
        ('"a"', "a JSON str, not an object"),
        (
            '{"text": "\\ud83d cut"}',
            r"the field 'text' holds half of a surrogate pair \(\\ud83d, character 1\)",
        ),
        ('{"text": "a\\u0000"}', r"the field 'text' holds a NUL \(character 2\)"),
        ('{"txt": "a"}', "the field 'text' is missing"),
    ],
)
def test_malformed_lines(line: str, message: str) -> None:
    document = RawDocument("a.jsonl", 3, line.encode(), 1)
    with pytest.raises(Refusal, match=f"a.jsonl, line 3: {message}"):
        document.text_field(document.json_object(), "text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a".encode("utf-16"), "UTF-16 or UTF-32: convert it"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"\xff\xff\xff\xff\x10", "an Arrow file"),
        (b"PK\x03\x04", "an archive"),
        (b"BZh91AY&SY", "compressed with bzip2 or xz, which are not read"),
        (b"\xfd7zXZ\0", "compressed with bzip2 or xz"),
        (gzip.compress(gzip.compress(b"a", mtime=0), mtime=0), "compressed twice"),
        (gzip.compress(b"PAR1", mtime=0), "parquet in a compressed file"),
    ],
    ids=["utf-16", "arrow", "arrow stream", "zip", "bzip2", "xz", "twice", "parquet within"],
)
@pytest.mark.parametrize("form", ["auto", "text", "jsonl"])
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str, form: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt is .*{message}"):
        detect_format([str(path)], JsonKeys()) if form == "auto" else list(
            read_documents([str(path)], form, "file")
        )


@pytest.mark.parametrize(
    ("pack", "damage"), [(gzip.compress, "cut"), (gzip.compress, "flipped"), (zstd, "cut")]
)
def test_damaged_files_are_named(tmp_path: Path, pack: Callable[[bytes], bytes], damage: str) -> None:
    whole = pack(os.urandom(5000).hex().encode() + b"\n")
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(
        whole[:-9] if damage == "cut" else whole[:2500] + bytes([whole[2500] ^ 255]) + whole[2501:]
    )
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged, or cut off \((gzip|zstd): "):
        documents(path)


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", "parquet")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet, after row 0: damaged"):
        documents(path)


def test_parquet_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is parquet, which is not text"):
        list(read_documents([str(tmp_path / "a.txt")], "text", "file"))


@pytest.mark.parametrize(("content", "kind"), [(b"PAR1", "parquet"), (b"\x28\xb5\x2f\xfd", "zstd")])
def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, kind: str) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{kind} needs pyarrow: pip install 'megatron_fdd\[parquet\]'"):
        documents(tmp_path / "a")


def test_nulls_that_arrow_adds_are_removed(tmp_path: Path) -> None:
    """The rows of one column get each other's fields."""
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "assistant", "tool_calls": [{"arguments": {"a": 1}}]}],
            "tools": [{"properties": {"a": {"enum": ["x", None], "default": {"b": None, "c": 1}}}}],
            "text": None,
        },
        {
            "messages": [{"role": "user", "content": "y", "tool_calls": [{"arguments": {"b": "z"}}]}],
            "tools": [{"properties": {"d": {"const": "w"}}}],
            "text": "x",
        },
    ]  # fmt: skip
    path = write_parquet(tmp_path / "a", rows)
    assert [document.json_object() for document in documents(path)] == rows


def test_values_that_json_has_no_word_for(tmp_path: Path) -> None:
    import datetime

    rows = [{"a": float("nan"), "b": b"text", "c": b"\xff\x00", "d": datetime.date(2026, 11, 29)}]
    (found,) = documents(write_parquet(tmp_path / "a", rows))
    assert found.json_object() == {"a": None, "b": "text", "c": {"bytes": 2}, "d": "2026-11-29"}


def feed(pipe: Path, content: bytes) -> threading.Thread:
    thread = threading.Thread(target=lambda: pipe.write_bytes(content))
    thread.start()
    return thread


@pytest.mark.parametrize("content", [LINES, ARRAY, gzip.compress(LINES)], ids=["lines", "array", "gzip"])
def test_a_pipe_is_looked_at_and_then_read(tmp_path: Path, content: bytes) -> None:
    os.mkfifo(tmp_path / "pipe")
    thread = feed(tmp_path / "pipe", content)
    assert detect_format([str(tmp_path / "pipe")], JsonKeys()) == "jsonl"
    assert [document.json_object() for document in documents(tmp_path / "pipe")] == RECORDS
    thread.join()


def test_a_slow_pipe(tmp_path: Path) -> None:
    """The bytes that tell the kind of a file come one by one."""
    os.mkfifo(tmp_path / "pipe")
    content = gzip.compress(LINES)

    def write_slowly() -> None:
        with (tmp_path / "pipe").open("wb", buffering=0) as file:
            for part in (content[:1], content[1:30], content[30:]):
                file.write(part)
                time.sleep(0.05)

    thread = threading.Thread(target=write_slowly)
    thread.start()
    assert detect_format([str(tmp_path / "pipe")], JsonKeys()) == "jsonl"
    assert len(documents(tmp_path / "pipe")) == 3
    thread.join()


def test_parquet_in_a_pipe_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    os.mkfifo(tmp_path / "pipe")
    thread = feed(tmp_path / "pipe", b"PAR1" * 100)
    with pytest.raises(ValueError, match="parquet cannot be read from a pipe; give the file"):
        documents(tmp_path / "pipe")
    thread.join()
