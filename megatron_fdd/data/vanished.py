"""Does a chat template write all of a conversation? Some drop reasoning, calls, schemas or the system's text silently.

A copy of the conversation gets a mark at the end of each of its texts. What a message of the assistant says must be in
what is learned of it, everything else in what is before the next answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_fdd.data.conversations import Conversation
from megatron_fdd.data.messages import Message

# What --allow-dropped takes.
FIELDS = ("system", "user", "tool", "tools", "content", "reasoning", "tool_calls")
_END_OF_REASONING = "</think>"
# By index of its message: the text before an answer, and the answer.
Answers = Mapping[int, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Vanished:
    """What is dropped. `field`: one of `FIELDS`; `where`: in words."""

    field: str
    where: str


def find_vanished(
    conversation: Conversation,
    answers: Callable[[Conversation], Answers],
    allowed: Collection[str] = (),
) -> tuple[Vanished, ...]:
    """What is not written: the first place of each field.

    Args:
        answers: what the template makes of a conversation of this shape; the same messages of it are learned.
        allowed: fields that may be dropped.
    """
    marker = _Marker()
    messages = tuple(_marked(message, index, marker) for index, message in enumerate(conversation.messages))
    tools = None
    if conversation.tools is not None:
        tools = tuple(_marked_tool(tool, marker) for tool in conversation.tools)
    found = answers(replace(conversation, messages=messages, tools=tools))
    dropped: dict[str, Vanished] = {}
    for mark in marker.marks:
        if mark.field not in allowed and not _is_written(mark, conversation.messages, found):
            dropped.setdefault(mark.field, Vanished(mark.field, mark.where))
    return tuple(dropped.values())


def shape(conversation: Conversation) -> object:
    """Equal for conversations of which a template writes the same parts."""
    messages = tuple(_shape_of(message) for message in conversation.messages)
    return messages, len(conversation.tools or ()), repr(sorted(conversation.template_kwargs.items()))


@dataclass(frozen=True, slots=True)
class _Mark:
    text: str
    field: str
    where: str
    message: int | None  # None: a tool's schema


class _Marker:
    """Hands out marks: ordinary letters that no text has, none of them a part of another."""

    def __init__(self) -> None:
        self.marks: list[_Mark] = []

    def mark(self, field: str, where: str, message: int | None) -> str:
        text = f"qz{len(self.marks)}zq"
        self.marks.append(_Mark(text, field, where, message))
        return text


def _is_written(mark: _Mark, messages: Sequence[Message], answers: Answers) -> bool:
    if mark.message is None:
        return not answers or mark.text in next(iter(answers.values()))[0]
    if mark.message in answers:
        return mark.text in answers[mark.message][1]
    if messages[mark.message]["role"] == "assistant" and mark.field == "reasoning":
        return True  # that of earlier turns may go
    later = [before for index, (before, _) in sorted(answers.items()) if index > mark.message]
    return not later or mark.text in later[0]


def _marked(message: Message, index: int, marker: _Marker) -> Message:
    """A copy of a message with a mark behind each of its texts."""
    is_answer = message["role"] == "assistant"
    marked = dict(message)
    for key, field in (("reasoning_content", "reasoning"), ("content", "content")):
        if message.get(key):
            parts = list(_parts(message[key], field if is_answer else message["role"], index, marker))
            marked[key] = "".join(parts)
    if message.get("tool_calls"):
        marked["tool_calls"] = [_marked_call(call, index, marker) for call in message["tool_calls"]]
    return marked


def _parts(text: str, field: str, index: int, marker: _Marker) -> Iterator[str]:
    """The text with marks; with one more before an end of reasoning in an answer's content."""
    number = index + 1
    if field == "content" and _END_OF_REASONING in text:
        thought, text = text.split(_END_OF_REASONING, 1)
        if thought.removeprefix("<think>").strip():
            yield thought.rstrip() + " " + marker.mark("reasoning", f"reasoning of message {number}", index)
            yield "\n"
        else:
            yield thought
        yield _END_OF_REASONING
    yield text
    if text.strip():
        name = "reasoning" if field == "reasoning" else "text"
        yield " " + marker.mark(field, f"{name} of message {number}", index)


def _marked_call(call: Mapping[str, Any], index: int, marker: _Marker) -> dict[str, Any]:
    function = call["function"]
    where = f"of message {index + 1}"
    name = function["name"] + marker.mark("tool_calls", f"name of a call {where}", index)
    arguments = {
        key: (value + " " if isinstance(value, str) else "")
        + marker.mark("tool_calls", f"argument {key!r} of a call {where}", index)
        for key, value in function["arguments"].items()
    }
    return {**call, "function": {**function, "name": name, "arguments": arguments}}


def _marked_tool(tool: Mapping[str, Any], marker: _Marker) -> dict[str, Any]:
    function = tool["function"]
    name = function["name"] + marker.mark("tools", f"schema of {function['name']!r}", None)
    return {**tool, "function": {**function, "name": name}}


def _shape_of(message: Message) -> object:
    content = message.get("content", "")
    thought, mark, said = content.rpartition(_END_OF_REASONING)
    calls = tuple(tuple(sorted(call["function"]["arguments"])) for call in message.get("tool_calls", ()))
    texts = bool(thought.removeprefix("<think>").strip()), bool(mark), bool(said.strip())
    return message["role"], tuple(sorted(message)), texts, bool(message.get("reasoning_content")), calls
