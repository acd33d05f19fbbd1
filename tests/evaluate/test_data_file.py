"""Published layouts of instructions: recognised by their fields, refused by name."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.data.instructions import LAYOUTS
from megatron_fdd.evaluate.data_file import DataFile, Selection, read_data_file, read_data_files

LONG = "one two three four five six seven eight nine ten eleven"
ALPACA = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
# A record, its layout, and for each of its instructions the text without a template, and the references.
RECORDS: list[tuple[dict[str, Any], str, list[tuple[str, list[str]]]]] = [
    (
        {"instruction": "Why?", "context": "It is so.", "response": "So.", "category": "closed_qa"},
        "dolly",
        [("Why?\n\nIt is so.", ["So."])],
    ),
    (
        {"instruction": "Why?", "prompt": "Below ...", "input": "", "output": ["a", "b"]},
        "alpaca",
        [("Why?", ["a", "b"])],
    ),
    (
        {
            "id": "user_oriented_task_0",
            "motivation_app": "Mail",
            "instruction": "Shorten.",
            "instances": [{"input": "Dear all", "output": "Hi"}],
        },
        "self-instruct",
        [("Shorten.\n\nDear all", ["Hi"])],
    ),
    (
        {
            "id": "seed_task_1",
            "name": "x",
            "instruction": "Go.",
            "instances": [{"input": "", "output": "a"}, {"input": "i", "output": "b"}],
            "is_classification": False,
        },
        "self-instruct",
        [("Go.", ["a"]), ("Go.\n\ni", ["b"])],
    ),
    (
        {
            "instruction": "Count.",
            "instances": [
                {"instruction_with_input": "...", "input": "x", "constraints": "In words.", "output": LONG},
                {"instruction_with_input": "...", "input": "y", "constraints": "None.", "output": LONG},
            ],
        },
        "unni",
        [("Count. In words.\n\nx", [LONG]), ("Count.\n\ny", [LONG])],
    ),
    (
        {"Definition": ["Say it."], "Instances": [{"id": "1", "input": "x", "output": [LONG, "short"]}]},
        "s-ni",
        [("Say it.\n\nx", [LONG, "short"])],
    ),
    (
        {"Task": "t", "Definition": ["Say it."], "Instance": {"id": "1", "input": "x", "output": [LONG]}},
        "s-ni",
        [("Say it.\n\nx", [LONG])],
    ),
    (
        {"task_name": "t", "id": "1", "definition": "Say it.", "inputs": "x", "targets": LONG},
        "s-ni",
        [("Say it.\n\nx", [LONG])],
    ),
    (
        {"question_id": 1, "category": "math", "turns": ["What?", "And?"], "reference": ["That.", "This."]},
        "vicuna",
        [("What?", ["That."])],
    ),
    ({"prompt": "Q: x A:", "response": "y"}, "prompt", [("Q: x A:", ["y"])]),
    ({"prompt": "Q: x A:", "answer": "y###eos_token###"}, "prompt", [("Q: x A:", ["y"])]),
    ({"question": "How many?", "answer": "3"}, "gsm8k", [("How many?", ["3"])]),
]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path, **selection: Any) -> DataFile:
    return read_data_file("data", path, Selection(**selection))


@pytest.mark.parametrize(("record", "layout", "expected"), RECORDS)
def test_layouts(
    tmp_path: Path, record: dict[str, Any], layout: str, expected: list[tuple[str, list[str]]]
) -> None:
    data = read(write(tmp_path / "a.jsonl", record, record))
    assert data.layout == layout
    found = [(one.message(), list(one.references)) for one in data.examples.values()]
    assert found == expected * 2
    for example in data.examples.values():
        asked = example.prompt("alpaca")
        assert (ALPACA in asked) == (layout != "prompt")
        assert ("### Input:\n" in asked) == bool(example.input)
        assert asked.endswith("\n\n### Response:\n") or layout == "prompt"


def test_every_layout_is_tested() -> None:
    assert {layout for _, layout, _ in RECORDS} == set(LAYOUTS)


def test_refused_by_file_line_and_fields(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"query": "x", "reply": "y"})
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 1: .*\['query', 'reply'\].*dolly \(instruction, con"
    ):
        read(file)
    dolly = RECORDS[0][0]
    with pytest.raises(
        ValueError, match=r"line 2: has the fields \['prompt'\], the layout dolly needs instr"
    ):
        read(write(file, dolly, {"prompt": "x"}))
    with pytest.raises(ValueError, match=r"line 1: the field 'response' is a int, not a text"):
        read(write(file, {**dolly, "response": 3}))
    with pytest.raises(
        ValueError, match=r"line 1: has the fields .*, the layout gsm8k needs question, answer"
    ):
        read(write(file, dolly), layout="gsm8k")
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        read(write(file))


def test_long_answers_and_the_first_ones(tmp_path: Path) -> None:
    short, long = ({"definition": "d", "inputs": "i", "targets": text} for text in ("short", LONG))
    file = write(tmp_path / "a.jsonl", short, long, short, long, long)
    assert list(read(file).examples) == [1, 3, 4]
    assert list(read(file, limit=2).examples) == [1, 3]
    assert list(read(file, min_answer_words=0).examples) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="--limit 0: at least 1"):
        read(file, limit=0)
    with pytest.raises(ValueError, match="--min-answer-words -1: 0 or more"):
        read(file, min_answer_words=-1)
    with pytest.raises(ValueError, match="none of 5 examples has an answer of at least 12 words"):
        read(file, min_answer_words=12)


def test_answers_to_vicuna_questions_are_joined_by_number(tmp_path: Path) -> None:
    file = write(
        tmp_path / "q.jsonl", *({"question_id": n, "text": f"q{n}", "category": "c"} for n in (1, 2))
    )
    with pytest.raises(ValueError, match=r"q.jsonl, line 1: question 1 has no reference.*--vicuna-answers"):
        read(file)
    answers = tmp_path / "a.jsonl"
    write(answers, {"question_id": 2, "choices": [{"index": 0, "turns": ["two", "more"]}]})
    with pytest.raises(ValueError, match="line 1: question 1 has no reference"):
        read(file, vicuna_answers=answers)
    write(answers, *({"question_id": n, "text": f"a{n}"} for n in (2, 1)))
    joined = read(file, vicuna_answers=answers)
    assert [one.references for one in joined.examples.values()] == [("a1",), ("a2",)]
    write(answers, *({"question_id": n, "text": f"b{n}"} for n in (2, 1)))
    assert read(file, vicuna_answers=answers).sha256 != joined.sha256
    write(answers, *({"question_id": str(n), "text": f"a{n}"} for n in (1, 2)))
    assert read(file, vicuna_answers=answers).examples == joined.examples
    write(answers, {"question_id": 1, "text": None})
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: an answer has question_id and text"):
        read(file, vicuna_answers=answers)
    other = write(tmp_path / "o.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(ValueError, match="--vicuna-answers: no file of --data holds Vicuna's questions"):
        read_data_files([("o", other)], Selection(vicuna_answers=answers))


def test_pipes_are_told_apart_by_what_came_out_of_them(tmp_path: Path) -> None:
    """`--data <(zcat data.jsonl.gz)`: what is left to read afterwards is the same of every pipe."""
    found = set()
    for number, answer in enumerate(("So.", "Thus.", "So.")):
        pipe = tmp_path / f"pipe{number}"
        os.mkfifo(pipe)
        line = json.dumps({"instruction": "Why?", "context": "", "response": answer, "category": "qa"})
        writer = threading.Thread(target=pipe.write_text, args=[line + "\n"])
        writer.start()
        found.add(read_data_file("d", pipe, Selection(min_answer_words=0)).sha256)
        writer.join()
    assert len(found) == 2
