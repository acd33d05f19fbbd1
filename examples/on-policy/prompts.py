"""The prompts of rounds on a student's own answers, out of a file: checked, each once, some of them held out.

    python examples/on-policy/prompts.py --input FILE --hf-model DIR --template chat ... --out DIR

writes DIR/train.jsonl and DIR/held-out.jsonl. A record there is an instruction as `fdd prepare` and `fdd evaluate`
read it, whose answer may be empty. Files are whole or not there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fdd.data.conversations import Conversation, read_conversation
from megatron_fdd.data.documents import RawDocument, input_bytes, read_documents
from megatron_fdd.data.instructions import (
    TEMPLATES,
    Instruction,
    Template,
    find_layout,
    known_layouts,
    read_record,
)
from megatron_fdd.host.disk import explain

Record = dict[str, Any]
# What a record lacks in the layouts of `fdd evaluate`: a context that would be empty, or an answer.
_NO_CONTEXT: Record = {"context": ""}
_NO_ANSWER: Record = {"response": "", "output": "", "answer": ""}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the file; `where` is its file and line."""

    where: str
    instruction: Instruction

    @property
    def answer(self) -> str:
        """The first answer of the file, or none."""
        return self.instruction.references[0] if self.instruction.references else ""

    def record(self, template: Template) -> Record:
        """Return it in the layout of all later files, in which no template but `chat` is needed any more."""
        if template != "chat":
            return {"prompt": self.instruction.prompt(template), "response": self.answer}
        asked: Record = {"instruction": self.instruction.message(), "input": ""}
        if self.instruction.system:
            asked["system"] = self.instruction.system
        if self.instruction.history:
            asked["history"] = [list(turn) for turn in self.instruction.history]
        return asked | {"output": self.answer}


def answer_key(record: Record) -> str:
    """Return the field of a record's answer."""
    return "response" if "response" in record else "output"


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of JSON lines: instructions of any layout of `fdd evaluate`, chats, or prompts without answers.

    Raises:
        ValueError: the file is missing or empty, or a record holds no prompt; names file and line.
    """
    input_bytes([str(path)])
    prompts = [
        Prompt(document.where, instruction)
        for document in read_documents([str(path)], "jsonl", "")
        for instruction in _instructions(document)
    ]
    if not prompts:
        raise ValueError(f"{path} is empty: give a file with a prompt in each line")
    for prompt in prompts:
        if not prompt.instruction.message().strip():
            raise ValueError(f"{prompt.where}: its prompt is empty; leave the record out")
    return prompts


def _instructions(document: RawDocument) -> list[Instruction]:
    fields = document.json_object()
    conversation = read_conversation(fields, document.where)
    if conversation is not None:
        return [_asked(conversation, document.where)]
    for missing in ({}, {} if "input" in fields else _NO_CONTEXT, _NO_ANSWER):
        layout = find_layout(missing | fields)
        if layout is not None:
            found = read_record(layout, missing | fields, document.where)
            break
    else:
        raise ValueError(
            f"{document.where}: has the fields {sorted(fields.keys() - _NO_ANSWER)}, which hold no prompt; known are: "
            f"messages; {known_layouts()}; all of them also without the answer"
        )
    given = [name for name in _NO_ANSWER if fields.get(name)]
    if given and not any(each.references and each.references[0] for each in found):
        raise ValueError(
            f"{document.where}: has an answer in {given[0]!r}, where records with the fields {sorted(fields)} have "
            f"none; name its fields as one of these has them: {known_layouts()}"
        )
    return found


def _asked(conversation: Conversation, where: str) -> Instruction:
    """Return a chat as its last question, with what was said before; its last answer is the given one."""
    messages = list(conversation.messages)
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    roles = [message["role"] for message in messages]
    is_plain = all(message.keys() == {"role", "content"} for message in messages)
    if conversation.tools or conversation.template_kwargs or not is_plain:
        raise ValueError(f"{where}: has tools, reasoning or switches of the template; leave it out")
    if len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError(f"{where}: its turns are {roles}; they must alternate and end with the user's")
    texts = [message["content"] for message in messages]
    history = tuple(zip(texts[:-1:2], texts[1::2], strict=True))
    return Instruction(texts[-1], "", (answer,), system=system, history=history)


def without_repeats(
    prompts: Sequence[Prompt], template: Template
) -> tuple[list[tuple[str, Record]], list[str]]:
    """Return place and record of each different prompt, the first one, and the places of the others."""
    kept: dict[str, tuple[str, Record]] = {}
    repeats = []
    for prompt in prompts:
        record = prompt.record(template)
        asked = json.dumps({key: value for key, value in record.items() if key != answer_key(record)})
        if asked in kept:
            repeats.append(prompt.where)
        kept.setdefault(asked, (prompt.where, record))
    return list(kept.values()), repeats


def divided(records: Sequence[Record], held_out: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Return the records to train on and those held out, in an order drawn by the seed.

    Raises:
        ValueError: none would be left to train on.
    """
    if not 1 <= held_out < len(records):
        raise ValueError(
            f"{len(records)} prompts can be used and HELD_OUT={held_out}: hold out at least one and fewer than all; "
            "give more prompts, or lower MAX_NEW_TOKENS if they are too long"
        )
    order = random.Random(f"{seed} held out").sample(records, len(records))
    return order[held_out:], order[:held_out]


def counted(what: str, wheres: Sequence[str]) -> Iterator[str]:
    """Yield a line for records that are not used as they came, if there are any: their number and the first three."""
    if wheres:
        more = ", ..." if len(wheres) > 3 else ""
        yield f"{what}: {len(wheres)} ({', '.join(wheres[:3])}{more})"


def write_lines(path: Path, records: Sequence[Record]) -> None:
    """Write JSON lines; the file is whole when it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(path)


def token_counts(
    records: Sequence[Record], template: Template, model: Path, switches: Mapping[str, Any]
) -> list[int]:
    """Return how many tokens the model is asked with, for each record; `switches` are the chat template's."""
    from megatron_fdd.evaluate.generation import encode_prompts
    from megatron_fdd.evaluate.models import NamedModel
    from megatron_fdd.evaluate.settings import GenerationSettings

    layout = "alpaca" if template == "chat" else "prompt"
    examples = {
        number: read_record(layout, record, f"prompt {number}")[0] for number, record in enumerate(records)
    }
    named = NamedModel("student", model)
    named.check()
    asked: Template = "chat" if template == "chat" else "none"
    settings = GenerationSettings(
        template=asked, max_prompt_tokens=sys.maxsize, chat_template_kwargs=switches
    )
    settings.check()
    return [len(prompt.ids) for prompt in encode_prompts(examples, named.tokenizer(), settings)]


def run(given: argparse.Namespace) -> None:
    """Read the file of prompts, print what is not used as it came, and write both files.

    Raises:
        ValueError: no prompt is left, or given answers are to be learned and are not there.
    """
    placed, repeats = without_repeats(read_prompts(given.input), given.template)
    records = [record for _, record in placed]
    longest = given.seq_length - given.max_new_tokens
    counts = token_counts(records, given.template, given.hf_model, given.chat_template_kwargs)
    too_long = [where for (where, _), count in zip(placed, counts, strict=True) if count > longest]
    room = f"prompts that leave less than {given.max_new_tokens} of {given.seq_length} tokens for an answer, left out"
    for line in (*counted("prompts that came before, taken once", repeats), *counted(room, too_long)):
        print(line)
    fitting = [record for record, count in zip(records, counts, strict=True) if count <= longest]
    train, held_out = divided(fitting, given.held_out, given.seed)
    learned = set(map(id, train))
    silent = [where for where, each in placed if id(each) in learned and not each[answer_key(each)].strip()]
    if given.own_fraction < 1 and silent:
        [which] = counted("prompts without an answer", silent)
        raise ValueError(
            f"{which}, and OWN_FRACTION={given.own_fraction:g} learns given answers too: give answers, or "
            "OWN_FRACTION=1"
        )
    write_lines(given.out / "held-out.jsonl", held_out)
    write_lines(given.out / "train.jsonl", train)
    print(f"{len(train)} prompts to train on, {len(held_out)} held out")


def main() -> int:
    """Read the file and write both; 1 and one line if something is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", type=Path, required=True, help="JSON lines")
    parser.add_argument("--hf-model", type=Path, required=True, help="a folder with the tokenizer")
    parser.add_argument("--template", choices=TEMPLATES, required=True, help="how prompts are asked")
    parser.add_argument("--chat-template-kwargs", type=json.loads, default={}, help="JSON, for chats")
    parser.add_argument("--seq-length", type=int, required=True, help="tokens of prompt and answer")
    parser.add_argument("--max-new-tokens", type=int, required=True, help="tokens of an answer")
    parser.add_argument("--held-out", type=int, required=True, help="prompts that are never learned")
    parser.add_argument("--own-fraction", type=float, required=True, help="below 1: prompts need answers")
    parser.add_argument("--seed", type=int, required=True, help="draws the prompts that are held out")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    try:
        run(parser.parse_args())
    except (ValueError, OSError) as error:
        print(f"prompts: error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
