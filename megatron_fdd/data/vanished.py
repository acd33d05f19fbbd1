"""The check that a chat template writes all of a conversation: some drop reasoning, calls, schemas or system text.

What a message of the assistant says must be in what is learned of that message; everything before an answer must be
in the text before it. Texts are searched for as they are, and as JSON writes them. A text that is not found may be
written in another form; it is searched for by marks: a copy of the conversation gets marks in it and is written
again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_fdd.data.conversations import Conversation
from megatron_fdd.data.messages import Message

# The values of --allow-dropped.
FIELDS = ("system", "user", "tool", "tools", "content", "reasoning", "tool_calls")
_THINKING = re.compile(r"(</?think>)")
# For the index of each answer's message: the text before the answer, and the answer.
Answers = Mapping[int, tuple[str, str]]
Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Vanished:
    """A dropped text. `field` is one of `FIELDS`; `where` names its place in words."""

    field: str
    where: str


@dataclass(frozen=True, slots=True)
class _Part:
    """A text of a conversation that must be written.

    Attributes:
        place: where the text is in the messages or tools: keys and indices, then the number of the piece.
        message: the index of its message; None for a schema.
        is_key: true for the name of an argument or a parameter.
    """

    text: str
    field: str
    where: str
    place: Path
    message: int | None
    is_key: bool = False


def find_vanished(
    conversation: Conversation,
    found: Answers,
    answers: Callable[[Conversation], Answers],
    allowed: Collection[str] = (),
) -> tuple[Vanished, ...]:
    """Return what is not written: the first place of each field.

    Args:
        found: what the template writes for the conversation.
        answers: returns what it writes for a changed copy of the conversation.
        allowed: fields that may be dropped.
    """
    parts = [part for part in _parts(conversation) if part.field not in allowed]
    missing = [part for part in parts if not _is_written(part, part.text, conversation.messages, found)]
    if missing:
        marks = {part: (f"qz{number}aq", f"qz{number}oq") for number, part in enumerate(missing)}
        again = answers(_marked(conversation, marks))
        missing = [
            part
            for part, pair in marks.items()
            if not all(_is_written(part, mark, conversation.messages, again) for mark in pair)
        ]
    dropped: dict[str, Vanished] = {}
    for part in missing:
        dropped.setdefault(part.field, Vanished(part.field, part.where))
    return tuple(dropped.values())


def _is_written(part: _Part, text: str, messages: Sequence[Message], answers: Answers) -> bool:
    """Whether a text is in the answer that it is a part of, or otherwise in every text before a later answer."""
    first = -1
    if part.message is not None:
        first, is_answer = part.message, part.message in answers
        if is_answer and not _is_in(text, answers[first][1]):
            return False
        # Reasoning of earlier turns may be dropped; a call needs to be written only once.
        if messages[first]["role"] == "assistant" and (
            part.field == "reasoning" or (part.field == "tool_calls" and is_answer)
        ):
            return True
    return all(_is_in(text, before) for index, (before, _) in answers.items() if index > first)


def _is_in(text: str, written: str) -> bool:
    """Whether `written` holds a text as it is, or as JSON writes it."""
    if text in written:
        return True
    return any(json.dumps(text, ensure_ascii=ascii_only)[1:-1] in written for ascii_only in (False, True))


def _parts(conversation: Conversation) -> Iterator[_Part]:
    for index, message in enumerate(conversation.messages):
        yield from _parts_of_message(message, index)
    for index, tool in enumerate(conversation.tools or ()):
        yield from _parts_of_tool(tool, index)


def _parts_of_message(message: Message, index: int) -> Iterator[_Part]:
    number, is_answer = index + 1, message["role"] == "assistant"
    if message.get("reasoning_content", "").strip():
        text = message["reasoning_content"].strip()
        yield _Part(
            text, "reasoning", f"reasoning of message {number}", (index, "reasoning_content", 0), index
        )
    content = message.get("content", "")
    pieces = _THINKING.split(content) if is_answer and "</think>" in content else [content]
    for at, piece in enumerate(pieces):
        if not piece.strip() or at % 2:  # a tag
            continue
        # Text before an end of reasoning is reasoning, even without a start of reasoning.
        is_thought = at + 1 < len(pieces) and pieces[at + 1] == "</think>"
        field = "reasoning" if is_thought else "content" if is_answer else message["role"]
        name = "reasoning" if is_thought else "text"
        yield _Part(piece.strip(), field, f"{name} of message {number}", (index, "content", at), index)
    for number_of_call, call in enumerate(message.get("tool_calls", ())):
        place: Path = (index, "tool_calls", number_of_call, "function")
        where = f"call of message {number}"
        function = call["function"]
        yield _Part(function["name"], "tool_calls", f"name of a {where}", (*place, "name", 0), index)
        for key, value in function["arguments"].items():
            text = value.strip() if isinstance(value, str) else ""
            inside = f"argument {key!r} of a {where}"
            yield _Part(key, "tool_calls", inside, (*place, "arguments", key), index, is_key=True)
            if text:
                yield _Part(text, "tool_calls", inside, (*place, "arguments", key, 0), index)


def _parts_of_tool(tool: Mapping[str, Any], index: int) -> Iterator[_Part]:
    function = tool["function"]
    where = f"schema of {function['name']!r}"
    place: Path = (index, "function")
    for key in ("name", "description"):
        text = function.get(key)
        if isinstance(text, str) and text.strip():
            yield _Part(text.strip(), "tools", where, (*place, key, 0), None)
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    for key in properties if isinstance(properties, dict) else ():
        yield _Part(key, "tools", where, (*place, "parameters", "properties", key), None, is_key=True)


def _marked(conversation: Conversation, marks: Mapping[_Part, tuple[str, str]]) -> Conversation:
    """Return a copy in which each of these texts begins and ends with a mark of its own; a name becomes its marks."""
    messages: Any = json.loads(json.dumps(list(conversation.messages)))
    tools: Any = json.loads(json.dumps([dict(tool) for tool in conversation.tools or ()]))
    renamed = []
    for part, pair in marks.items():
        within = tools if part.message is None else messages
        if part.is_key:
            renamed.append((within, part.place, " ".join(pair)))
            continue
        *path, key, piece = part.place
        for step in path:
            within = within[step]
        within[key] = _with_marks(within[key], int(piece), pair, is_name=key == "name")
    for within, (*path, key), name in renamed:  # last, because places are found by the old names
        for step in path:
            within = within[step]
        within[name] = within.pop(key)
    kept = None if conversation.tools is None else tuple(tools)
    return replace(conversation, messages=tuple(messages), tools=kept)


def _with_marks(text: str, piece: int, pair: tuple[str, str], *, is_name: bool) -> str:
    if is_name:
        return text + "".join(pair)
    pieces = _THINKING.split(text)
    if piece >= len(pieces) or piece == 0 and len(pieces) > 1 and "</think>" not in text:
        pieces = [text]
    words = pieces[piece]
    start, end = len(words) - len(words.lstrip()), len(words.rstrip())
    pieces[piece] = f"{words[:start]}{pair[0]} {words[start:end]} {pair[1]}{words[end:]}"
    return "".join(pieces)
