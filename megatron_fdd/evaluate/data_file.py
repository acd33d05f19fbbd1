"""A file of instructions for evaluation: which layout it has, and which of its examples count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fdd.data.documents import RawDocument, input_bytes, read_documents
from megatron_fdd.data.instructions import (
    LAYOUTS,
    Instruction,
    find_layout,
    known_layouts,
    read_record,
)
from megatron_fdd.data.records import text_field


@dataclass(frozen=True, slots=True)
class Selection:
    """Which examples of every file are read, and how.

    Attributes:
        layout: a name of `LAYOUTS`; None: the fields of the first line tell it.
        min_answer_words: leaves out examples whose first reference has fewer words; None: the value of the layout.
        limit: how many of the remaining examples to take, from the first one on.
        vicuna_answers: FastChat's answers to Vicuna's questions, which come without answers.
    """

    layout: str | None = None
    min_answer_words: int | None = None
    limit: int | None = None
    vicuna_answers: Path | None = None


@dataclass(frozen=True, slots=True)
class DataFile:
    """The examples of one file.

    Attributes:
        examples: each example by its number in the whole file, from 0.
        sha256: hash of the file, and of the answers it is joined with.
    """

    name: str
    path: Path
    layout: str
    min_answer_words: int
    examples: dict[int, Instruction]
    sha256: str


def read_data_files(files: Iterable[tuple[str, Path]], selection: Selection) -> tuple[DataFile, ...]:
    """Read each name and path with `read_data_file`.

    Raises:
        ValueError: as in `read_data_file`; or there are answers to questions that no file asks.
    """
    found = tuple(read_data_file(name, path, selection) for name, path in files)
    if selection.vicuna_answers is not None and all(data.layout != "vicuna" for data in found):
        raise ValueError("--vicuna-answers: no file of --data holds Vicuna's questions; leave it out")
    return found


def read_data_file(name: str, path: Path, selection: Selection) -> DataFile:
    """Read a file and select its examples.

    Raises:
        ValueError: the file is missing, malformed or of an unknown layout; a reference is missing; or no example
            is left.
    """
    if selection.limit is not None and selection.limit < 1:
        raise ValueError(f"--limit {selection.limit}: at least 1")
    if selection.min_answer_words is not None and selection.min_answer_words < 0:
        raise ValueError(f"--min-answer-words {selection.min_answer_words}: 0 or more")
    input_bytes([str(path)])
    documents = list(read_documents([str(path)], "jsonl", ""))
    if not documents:
        raise ValueError(f"{path} is empty")
    layout = selection.layout or _recognise(documents[0])
    answers = _read_vicuna_answers(selection.vicuna_answers) if layout == "vicuna" else {}
    instructions: list[Instruction] = []
    for document in documents:
        instructions += _read(document, layout, answers)
    least = LAYOUTS[layout].min_answer_words
    if selection.min_answer_words is not None:
        least = selection.min_answer_words
    kept = {
        number: instruction
        for number, instruction in enumerate(instructions)
        if len(instruction.references[0].split()) >= least
    }
    if not kept:
        raise ValueError(
            f"{path}: none of {len(instructions)} examples has an answer of at least {least} words; "
            "lower --min-answer-words"
        )
    digest = _digest(path, documents)
    if layout == "vicuna" and selection.vicuna_answers is not None:
        given = selection.vicuna_answers
        digest.update(given.read_bytes() if given.is_file() else json.dumps(answers).encode())
    examples = dict(list(kept.items())[: selection.limit])
    return DataFile(name, path, layout, least, examples, digest.hexdigest())


def _digest(path: Path, documents: Iterable[RawDocument]) -> hashlib._Hash:
    """Hash a file; or what was read of a pipe, which can be read once."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes())
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.content + b"\n")
    return digest


def _recognise(first: RawDocument) -> str:
    fields = first.json_object()
    layout = find_layout(fields)
    if layout is None:
        raise ValueError(
            f"{first.where}: has the fields {sorted(fields)}, which match no known layout; known are: "
            f"{known_layouts()}. Rename the fields, or force one with --format"
        )
    return layout


def _read(document: RawDocument, layout: str, answers: dict[str, str]) -> list[Instruction]:
    fields = document.json_object()
    instructions = read_record(layout, fields, document.where)
    if all(instruction.references for instruction in instructions):
        return instructions
    answer = answers.get(str(fields.get("question_id")))
    if answer is None:
        raise ValueError(
            f"{document.where}: question {fields.get('question_id')} has no reference answer; give FastChat's "
            "answers with --vicuna-answers"
        )
    return [Instruction(one.instruction, one.input, (answer,), one.is_prompt) for one in instructions]


def _read_vicuna_answers(path: Path | None) -> dict[str, str]:
    """Return the answers by question.

    A line has either a `text`, or `choices` with `turns`, of which the first counts.
    """
    if path is None:
        return {}
    input_bytes([str(path)])
    answers: dict[str, str] = {}
    for document in read_documents([str(path)], "jsonl", ""):
        fields: dict[str, Any] = document.json_object()
        try:
            text = fields["text"] if "text" in fields else fields["choices"][0]["turns"][0]
            answers[str(fields["question_id"])] = text_field({"text": text}, "text")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"{document.where}: an answer has question_id and text, or choices with turns; "
                f"this line has {json.dumps(sorted(fields))}"
            ) from error
    return answers
