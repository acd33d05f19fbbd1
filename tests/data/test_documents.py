"""Where documents begin and end, and what files hold."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from megatron_fdd.data.documents import JsonKeys, RawDocument, detect_format, expand_inputs, read_documents

TEXT = "\nfirst\nstill first\n\n\nsecond\r\n---\nthird"


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("file", [(1, TEXT)]),
        ("blank-line", [(2, "first\nstill first"), (6, "second\r\n---\nthird")]),
        ("---", [(1, TEXT.partition("---")[0].strip("\r\n")), (8, "third")]),
    ],
)
def test_text_documents(tmp_path: Path, separator: str, expected: list[tuple[int, str]]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    documents = list(read_documents([str(path)], "text", separator))
    assert [(d.number, d.text()) for d in documents] == expected
    assert sum(d.num_bytes for d in documents) == len(TEXT)


def test_jsonl_skips_blank_lines_and_keeps_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\n\n  \n{"text": "y"}\n')
    documents = list(read_documents([str(path)], "jsonl", "file"))
    assert [(d.number, d.json_object()["text"]) for d in documents] == [(1, "x"), (4, "y")]
    assert sum(d.num_bytes for d in documents) == path.stat().st_size - len("\n  \n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "x"}', "jsonl"),
        ('{"prompt": "x", "response": "y"}', "instruction"),
        ('{"messages": []}', "instruction"),
    ],
)
def test_formats(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + line)
    assert detect_format([str(path)], JsonKeys()) == expected


def test_format_by_key_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "x", "answer": "y"}')
    assert detect_format([str(path)], JsonKeys(prompt="question", response="answer")) == "instruction"
    with pytest.raises(ValueError, match=r"line 1: .*\['answer', 'question'\].*--prompt-key"):
        detect_format([str(path)], JsonKeys())


def test_published_instructions_need_a_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "x", "context": "", "response": "y"}')
    assert detect_format([str(path)], JsonKeys(), has_template=True) == "instruction"
    with pytest.raises(ValueError, match="or give --template alpaca, which reads this layout .dolly"):
        detect_format([str(path)], JsonKeys())


def test_files_of_different_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ValueError, match="one format at a time"):
        detect_format([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], JsonKeys())


def test_bad_bytes_are_found_on_their_line() -> None:
    document = RawDocument("a.txt", 5, b"good\nbad \xff here", 15)
    with pytest.raises(ValueError, match=r"a.txt, line 6: byte 0xff is not UTF-8"):
        document.text()


@pytest.mark.parametrize(
    ("record", "response", "expected"),
    [
        ('{"conversations": [{"from": "human"}]}', "response", "instruction"),
        ('{"prompt": [], "completion": []}', "response", "instruction"),
        ('{"query": "x", "tools": "[]", "answers": "[]"}', "response", "instruction"),
        ('{"chosen": [{}]}', "chosen", "instruction"),
        ('{"prompt": "x", "chosen": "y"}', "chosen", "instruction"),
        ('{"conversation": "A: x", "text": "y"}', "response", "jsonl"),
    ],
)
def test_formats_of_published_layouts(tmp_path: Path, record: str, response: str, expected: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"[{record}]")
    assert detect_format([str(path)], JsonKeys(response=response)) == expected


def test_chosen_answers_are_read_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"chosen": [], "rejected": []}')
    with pytest.raises(ValueError, match="line 1: .*or give --response-key chosen"):
        detect_format([str(path)], JsonKeys())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", '{"text": "x"}\n', "jsonl"),
        ("a", '\n {"text": "x"}\n', "jsonl"),
        ("a.TXT", '[\n {"text": "x"}]', "jsonl"),
        ("a.JSONL", '{"text": "x"}', "jsonl"),
        ("a.txt", "{ int x; }", "text"),
        ("a.txt", "[1] A reference", "text"),
        ("a.txt", "{{ jinja }}", "text"),
        ("a.txt", "", "text"),
    ],
)
def test_content_tells_the_format(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    assert detect_format([str(tmp_path / name)], JsonKeys()) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b", "is a table: write it as JSON lines"),
        ("a.tsv.gz", "a\tb", "is a table: write it as JSON lines"),
        ("a.arrow", "", "is an Arrow file: write it as parquet"),
        ("a.json", " \n", "is empty; remove it"),
        ("a.json", "[]", "is empty; remove it"),
        ("a.json", "{\n", "a.json, line 1: malformed JSON"),
        ("a.txt", '{"text": "' + "x" * 5_000_000, "its first record is very long; say with --format"),
    ],
)
def test_files_without_a_format(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        detect_format([str(tmp_path / name)], JsonKeys())


def test_a_malformed_first_record_does_not_hide_the_format(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": \n{"text": "x"}\n')
    assert detect_format([str(path)], JsonKeys()) == "jsonl"


def test_folders(tmp_path: Path) -> None:
    names = ["b/2.jsonl.gz", "b/10.json", "a.parquet", "c.txt"]
    others = ["README.md", "dataset_infos.json", ".hidden.json", ".cache/x.json", "d.csv", "state.json"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "z.jsonl").symlink_to(tmp_path / "b/10.json")  # as in the hub's cache
    expected = ["a.parquet", "b/10.json", "b/2.jsonl.gz", "c.txt", "z.jsonl"]
    assert expand_inputs([str(tmp_path)]) == tuple(str(tmp_path / name) for name in expected)
    assert expand_inputs([str(tmp_path / "d.csv")]) == (str(tmp_path / "d.csv"),)


def test_folders_without_data(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no data in the folder .*: it has no file with a known suffix; names must end in"
    ):
        expand_inputs([str(tmp_path)])
    (tmp_path / "data.arrow").touch()
    with pytest.raises(ValueError, match=r"data\.arrow is an Arrow file: write it as parquet"):
        expand_inputs([str(tmp_path)])
    with pytest.raises(ValueError, match="nowhere does not exist"):
        expand_inputs([str(tmp_path / "nowhere")])


@pytest.mark.parametrize("separator", ["file", "blank-line"])
def test_compressed_text(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbffirst\n\nsecond"))
    assert detect_format([str(path)], JsonKeys()) == "text"
    found = [document.text() for document in read_documents([str(path)], "text", separator)]
    assert found == (["first\n\nsecond"] if separator == "file" else ["first", "second"])


def test_nul_is_in_no_text() -> None:
    with pytest.raises(ValueError, match=r"a.txt, line 2: byte 0x00 is in no text"):
        RawDocument("a.txt", 1, b"good\nb\0", 7).text()


@pytest.mark.parametrize("name", ["zeros.txt", "zeros.jsonl"])
def test_a_device_is_no_input(name: str, tmp_path: Path) -> None:
    """It may never end."""
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{name} is a device; give a file or a pipe"):
        detect_format([str(tmp_path / name)], JsonKeys())
    with pytest.raises(ValueError, match=rf"{name} is a device; give a file or a pipe"):
        list(read_documents([str(tmp_path / name)], "text", "file"))
