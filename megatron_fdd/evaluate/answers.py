"""The file of one model's answers to one data file with one seed, which grows batch by batch.

A killed run continues with it. Its first line holds the settings; a run with other settings refuses the file. Each
further line is an answer with its score. A finished file is rewritten once, in the order of the examples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fdd.evaluate.generation import Prompt
from megatron_fdd.host.disk import regular_file, replacing
from megatron_fdd.host.field_kinds import TEXT, number, shown, whole, wrong_field
from megatron_fdd.host.json_file import parse_json

_ANSWER = {"number": whole(0, 10**15), "answer": TEXT, "rouge_l": number(0, 101)}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `number` is the number of the example, `rouge_l` its score, 0 to 100."""

    number: int
    answer: str
    rouge_l: float


class AnswersFile:
    """The answers that exist already, and the file to which further ones are appended."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Read the file, if it exists; a last line that a killed run left unfinished does not count.

        Raises:
            ValueError: the answers were made with other settings, or the file holds no answers.
        """
        self.path = regular_file("--out", path)
        self.settings = settings
        self.answers = self._read() if self.path.exists() else {}

    def _read(self) -> dict[int, Answer]:
        try:
            # Each line was written with its line break: text after the last line break is unfinished.
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
            if not lines:
                return {}
            first, *records = [parse_json(line, self.path) for line in lines]
            made_with = dict(first["settings"])
            answers = [Answer(**record) for record in records]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._no_answers() from error
        if any(wrong_field(asdict(answer), _ANSWER) is not None for answer in answers):
            raise self._no_answers()
        differing = [key for key in self.settings if made_with.get(key) != self.settings[key]]
        if differing:
            changes = ", ".join(
                f"{key} {shown(made_with.get(key))} -> {shown(self.settings[key])}" for key in differing
            )
            raise ValueError(
                f"{self.path} holds answers made with other settings ({changes}): give another --out, or delete "
                "it to start again"
            )
        return {answer.number: answer for answer in answers}

    def _no_answers(self) -> ValueError:
        return ValueError(f"{self.path} does not hold answers: delete it or give another --out")

    def open_batches(self, batches: Iterable[list[Prompt]]) -> list[list[Prompt]]:
        """Return the batches with unanswered prompts; each keeps its composition, and with it its rounding."""
        return [batch for batch in batches if any(prompt.number not in self.answers for prompt in batch)]

    def append(self, batch: list[Answer]) -> None:
        """Add a batch; it is on disk when this returns."""
        is_new = not self.answers
        self.answers.update((answer.number, answer) for answer in batch)
        if is_new:
            self._replace(batch)
            return
        self._end_torn_line()
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(_lines(batch)))
            file.flush()
            os.fsync(file.fileno())

    def _end_torn_line(self) -> None:
        """Cut the file after its last whole line."""
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() == b"\n":
                return
        content = self.path.read_bytes()
        os.truncate(self.path, content.rfind(b"\n") + 1)

    def finish(self, numbers: Iterable[int]) -> list[Answer]:
        """Rewrite the file in the order of the examples, and return the answers to `numbers` in their order."""
        self._replace(sorted(self.answers.values(), key=lambda answer: answer.number))
        return [self.answers[number] for number in numbers]

    def _replace(self, answers: Iterable[Answer]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial, partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"settings": self.settings}) + "\n")
            file.writelines(_lines(answers))
            file.flush()
            os.fsync(file.fileno())


def _lines(answers: Iterable[Answer]) -> Iterator[str]:
    return (json.dumps(asdict(answer)) + "\n" for answer in answers)


def batches_by_length(prompts: list[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Put prompts of similar length together, to save padding; the longest come first, so that memory fails early."""
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.number))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
