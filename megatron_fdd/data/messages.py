"""Published messages, read into the form that chat templates take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_fdd.data.records import Fields, check_text, check_values, parse_json
from megatron_fdd.data.refusals import Fault, Reason

# A message as chat templates read it: `role`, `content` (a text), and where given `reasoning_content` (a text), `name`,
# `tool_call_id`, `tool_calls` (a list of {"type": "function", "id"?, "function": {"name", "arguments": object}}).
Message = dict[str, Any]

_ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool", "function": "tool",
}  # fmt: skip
# Roles whose content is the call itself.
_CALLS = ("function_call", "tool_call")
_FLAGS = ("weight", "loss", "train", "training", "trainable")
_REASONING = ("reasoning_content", "reasoning", "thinking")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_KNOWN = frozenset(
    ["role", "from", "content", "value", "tool_calls", "function_call", "name", "tool_call_id", *_REASONING]
    + [*_FLAGS, *MEDIA]
)
# Fields of a message that no template reads.
_IGNORED = frozenset(
    "id index uuid turn timestamp created created_at date model source language lang metadata annotations "
    "token_count num_tokens".split()
)


@dataclass(slots=True)
class Turns:
    """Messages, with the information which of them are learned and which of their fields nobody reads."""

    messages: list[Message] = field(default_factory=list)
    is_learned: list[bool] = field(default_factory=list)
    unknown_fields: set[str] = field(default_factory=set)

    def add(self, message: Message, is_learned: bool) -> None:
        """Append one message."""
        self.messages.append(message)
        self.is_learned.append(is_learned)

    def extend(self, other: Turns, *, learn: bool = True) -> None:
        """Append the messages of another; without `learn` as context that is not learned."""
        self.messages += other.messages
        self.is_learned += [learn and is_learned for is_learned in other.is_learned]
        self.unknown_fields |= other.unknown_fields


def read_messages(value: object, name: str) -> Turns:
    """Return the messages of the field `name`, which is a list or the JSON text of one.

    Raises:
        Fault: a message is malformed or has no text; names its number, from 1.
    """
    messages = decoded(value, name)
    if not isinstance(messages, list) or not messages:
        raise Fault(f"{name!r} must be a list with at least one message")
    turns = Turns()
    for number, message in enumerate(messages, 1):
        try:
            if not _add_plain(message, turns):
                _read_message(message, turns)
        except Fault as error:
            raise Fault(f"message {number} {error}", error.reason) from error
    return turns


def decoded(value: object, name: str) -> object:
    """Return a value; if it is a text, the JSON in it.

    Raises:
        Fault: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except Fault as error:
        raise Fault(f"has a text in {name!r} that is not JSON: {error}") from error


def _add_plain(given: object, turns: Turns) -> bool:
    """Append a message that has only a role and a text, as most do; return false for any other message."""
    if not isinstance(given, dict) or len(given) != 2:
        return False
    role = given.get("role", given.get("from"))
    content = given.get("content", given.get("value"))
    if not isinstance(role, str) or not isinstance(content, str) or role not in _ROLES or role in _CALLS:
        return False
    check_content(content)
    role = _ROLES[role]
    turns.add({"role": role, "content": content}, role == "assistant")
    return True


def _read_message(given: object, turns: Turns) -> None:
    if not isinstance(given, dict):
        raise Fault(f"is a {type(given).__name__}; it must be an object with a role and a content")
    name = _only(given, ("role", "from"))
    if not isinstance(name, str):
        raise Fault(f"has a {type(name).__name__} as its role; it must be a text")
    name = name.strip().lower()
    role = _ROLES.get(name)
    if role is None:
        raise Fault(f"has the role {name!r:.50}; known are {', '.join(sorted(_ROLES))}")
    is_call = name in _CALLS
    content = _only(given, ("content", "value"))
    _refuse_media(given)
    message: Message = {"role": role}
    calls = content if is_call else _only(given, ("tool_calls", "function_call"))
    thoughts: list[str] = []
    if is_call:
        message["content"] = ""
    elif content is None and given.keys().isdisjoint(("content", "value", *_REASONING)) and not calls:
        raise Fault("must have a text as its 'content'")
    else:
        message["content"] = _content(content, thoughts)
    if reasoning := _reasoning(given, thoughts):
        message["reasoning_content"] = reasoning
    if calls or is_call:
        if role != "assistant":
            raise Fault(f"calls a tool as {role}; only the assistant does")
        message["tool_calls"] = _calls(calls)
    for key in ("name", "tool_call_id"):
        if given.get(key) is not None:
            message[key] = _text(given, key)
    flag = _flag(given)
    turns.add(message, role == "assistant" and flag is not False)
    turns.unknown_fields |= _unknown(given, is_learnable=role == "assistant" or not flag)


def check_content(text: str) -> None:
    """Refuse the content of a message that `check_text` refuses."""
    try:
        check_text(text)
    except Fault as error:
        raise Fault(f"has a content that {error}") from error


def _only(given: Fields, names: Iterable[str]) -> Any:
    """Return the value that a message has under one of several names; None if it has none.

    Raises:
        Fault: two names have different values.
    """
    found = [name for name in names if given.get(name) is not None]
    for name in found[1:]:
        if given[name] != given[found[0]]:
            raise Fault(f"says one thing in {found[0]!r} and another in {name!r}")
    return given[found[0]] if found else None


def _text(given: Fields, key: str) -> str:
    value = given[key]
    if not isinstance(value, str):
        raise Fault(f"has a {type(value).__name__} as its {key!r}; it must be a text")
    try:
        check_text(value)
    except Fault as error:
        raise Fault(f"has a {key!r} that {error}") from error
    return value


def _content(content: object, thoughts: list[str]) -> str:
    """Return the text of a content; for a list of parts, all their texts joined. Reasoning goes to `thoughts`."""
    if content is None:
        return ""
    if isinstance(content, list):
        content = "".join(_part(part, thoughts) for part in content)
    if not isinstance(content, str):
        raise Fault(
            f"must have a text, or a list of parts of text, as its 'content', not a {type(content).__name__}"
        )
    check_content(content)
    return content


def _part(part: object, thoughts: list[str]) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise Fault('must have a text, or a list of {"type": "text", "text": ...}, as its \'content\'')
    if kind in ("thinking", "reasoning"):
        thoughts.append(_content(part.get(kind, part.get("text")), thoughts))
        return ""
    if kind not in ("text", "input_text", "output_text"):
        raise Fault(f"has a part of the type {kind!r:.50}", Reason.MEDIA)
    if not isinstance(part.get("text"), str):
        raise Fault("has a part of the type 'text' without a text in 'text', which must be there")
    return part["text"]


def _reasoning(given: Fields, thoughts: list[str]) -> str:
    value = _only(given, _REASONING)
    if value is None:
        return "".join(thoughts)
    if thoughts:
        raise Fault("has reasoning both in its content and beside it")
    return _text({"reasoning_content": value}, "reasoning_content")


def _flag(given: Fields) -> bool | None:
    """Return whether a message is marked as learned or as not learned; None without a mark."""
    value = _only(given, _FLAGS)
    if value is None:
        return None
    if not isinstance(value, int | float) or value not in (0, 1):
        name = next(name for name in _FLAGS if given.get(name) is not None)
        raise Fault(f"has {name!r} {value!r:.50}; a message is learned or not: 1 or 0, true or false")
    return bool(value)


def _refuse_media(given: Fields) -> None:
    """Refuse a message with a picture, a sound or the like."""
    for key in MEDIA:
        if given.get(key):
            raise Fault(f"has {key!r}", Reason.MEDIA)


def _unknown(given: Fields, *, is_learnable: bool) -> set[str]:
    names = {name for name in given.keys() - _KNOWN - _IGNORED if given[name] not in (None, "", [], {})}
    if not is_learnable:  # messages of the user or a tool are never learned, whatever their mark
        names |= {f"{name} (not of the assistant)" for name in _FLAGS if given.get(name)}
    return {f"messages[].{name}" for name in names}


def _calls(value: object) -> list[dict[str, Any]]:
    """Read calls in any form.

    They are a list or a single call, wrapped as {"function": ...} or bare, or the JSON text of these.
    """
    value = decoded(value, "tool_calls")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise Fault("calls no tool; leave the empty call out")
    return [_call(call, number) for number, call in enumerate(calls, 1)]


def _call(call: object, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise Fault(f"has a call (number {number}) that is not an object with 'name' and 'arguments'")
    if call.get("type") not in (None, "function"):
        raise Fault(
            f"has a call (number {number}) of the type {call['type']!r:.50}; only functions are called"
        )
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise Fault(f"has a call (number {number}) without the text 'name'")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if arguments in (None, "") else decoded(arguments, "arguments")
    if not isinstance(arguments, dict):
        raise Fault(
            f"has a call of {name!r:.50} whose arguments are a {type(arguments).__name__}, not an object"
        )
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        read["id"] = _text(call, "id")
    try:
        check_values(read)
    except Fault as error:
        raise Fault(f"has a call (number {number}) that {error}") from error
    return read


def read_tools(value: object, name: str) -> tuple[Fields, ...] | None:
    """Return the schemas of tools, wrapped as {"type": "function", "function": {...}}; None where there are none.

    Args:
        value: a list of schemas or a single schema, wrapped or bare, or the JSON text of these.

    Raises:
        Fault: a schema is malformed; names its number, from 1.
    """
    value = decoded(value, name) if value != "" else None
    if value is None or value == []:
        return None
    tools = []
    for number, tool in enumerate(value if isinstance(value, list) else [value], 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault(f"{name!r} must hold functions with a 'name'; number {number} is none")
        try:
            check_values(tool)
        except Fault as error:
            raise Fault(f"{name!r}, number {number}, {error}") from error
        if function is tool:
            tool = {"function": {key: part for key, part in tool.items() if key != "type"}}
        tools.append({"type": "function", **tool})
    return tuple(tools)
