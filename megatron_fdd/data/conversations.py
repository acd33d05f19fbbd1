"""Conversations in every layout in which they are published, read into the one form that a chat template takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_fdd.data.instructions import Instruction
from megatron_fdd.data.messages import (
    MEDIA,
    Message,
    Turns,
    check_content,
    decoded,
    read_messages,
    read_tools,
)
from megatron_fdd.data.records import Fields, check_values, text_field
from megatron_fdd.data.refusals import Fault, Reason, refusing

# The field in which the better of two answers is published; it is read only on request.
CHOSEN = "chosen"
_LISTS = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_KWARGS = ("chat_template_kwargs", "enable_thinking", "documents")
# Variables of the template that a record cannot set: they come from elsewhere, or decide what is learned.
_RESERVED = (
    "messages conversation tools chat_template add_generation_prompt continue_final_message tokenize return_dict "
    "return_tensors return_assistant_tokens_mask"
).split()
# Fields beside a conversation that no template reads.
_IGNORED = frozenset(
    "id _id uid uuid idx index ids prompt_id conversation_id session_id question_id example_id message_id hash source "
    "sources dataset dataset_name subset split origin metadata meta meta_data info category categories topic task type "
    "tag tags label language languages lang license url created created_at updated_at timestamp date time author model "
    "model_name generator score scores score_chosen score_rejected rating quality difficulty length num_turns turn "
    "num_tokens token_count title __index_level_0__".split()
)
# Fields that any layout may have beside its messages.
_BESIDE = _IGNORED.union(_SYSTEM, _KWARGS, MEDIA, ["tools", "functions"])


@dataclass(frozen=True, slots=True)
class Conversation:
    """One record, in the form that a chat template takes.

    Attributes:
        messages: normalised: every content is a text, and the arguments of calls are objects.
        is_learned: one entry for each message; true for the assistant's, unless the record says otherwise
            or the message is the first.
        tools: schemas as {"type": "function", "function": {...}}; None without tools.
        template_kwargs: further variables of the template that the record sets (`enable_thinking`, `documents`).
        unknown_fields: fields of the record, and of messages as "messages[].NAME", that nobody reads; sorted.
    """

    messages: tuple[Message, ...]
    is_learned: tuple[bool, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    unknown_fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Layout:
    """One way to publish conversations.

    Attributes:
        text: the fields of a record, in words.
        matches: whether a record has this layout.
        read: returns the messages of a record.
        known: fields that are read, or left out on purpose.
    """

    text: str
    matches: Callable[[Fields], bool]
    read: Callable[[Fields], Turns]
    known: frozenset[str]


def is_conversation(fields: Fields, response_key: str | None = None) -> bool:
    """Whether a record has the layout of a conversation; it may still be malformed."""
    return _layout(fields, response_key) is not None


def conversation_layouts() -> str:
    """Return all layouts and their fields in words, for messages and help."""
    return "; ".join(layout.text for layout in (*_LAYOUTS, _PREFERENCE))


def read_conversation(fields: Fields, where: str, *, response_key: str | None = None) -> Conversation | None:
    """Return the conversation of a record; None if its fields belong to no layout of conversations.

    Args:
        response_key: "chosen" reads the better of two answers.

    Raises:
        Refusal: the conversation is malformed; names `where`, the message and the field.
    """
    layout = _layout(fields, response_key)
    if layout is None:
        return None
    with refusing(where):
        turns = layout.read(fields)
        return _assemble(fields, turns, layout.known)


def instruction_conversation(instruction: Instruction, where: str) -> Conversation:
    """Return an instruction and its first reference as a conversation: system text, earlier turns, and this turn.

    Raises:
        Refusal: the instruction has no reference, or has characters that no tokenizer takes.
    """
    with refusing(where):
        if not instruction.references:
            raise Fault("has no answer to learn")
        messages = [*instruction.messages(), {"role": "assistant", "content": instruction.references[0]}]
        for message in messages:
            check_content(message["content"])
        is_learned = tuple(message["role"] == "assistant" for message in messages)
        return Conversation(tuple(messages), is_learned)


def _layout(fields: Fields, response_key: str | None) -> _Layout | None:
    layouts = (_PREFERENCE, *_LAYOUTS) if response_key == CHOSEN else _LAYOUTS
    return next((layout for layout in layouts if layout.matches(fields)), None)


def _assemble(fields: Fields, turns: Turns, known: frozenset[str]) -> Conversation:
    for key in MEDIA:
        if fields.get(key):
            raise Fault(f"has {key!r}", Reason.MEDIA)
    unknown = {name for name in fields.keys() - known if fields[name] is not None} | turns.unknown_fields
    turns = _with_system(fields, turns)
    if turns.messages[0]["role"] == "assistant":  # nothing asks for it
        turns.is_learned[0] = False
    tools = [read_tools(fields[name], name) for name in ("tools", "functions") if fields.get(name)]
    if len(tools) > 1:
        raise Fault("has 'tools' and 'functions'; give one of them")
    return Conversation(
        tuple(turns.messages),
        tuple(turns.is_learned),
        tools[0] if tools else None,
        _template_kwargs(fields) if not fields.keys().isdisjoint(_KWARGS) else {},
        tuple(sorted(unknown)),
    )


def _with_system(fields: Fields, turns: Turns) -> Turns:
    """Return the messages, preceded by the system text that stands beside them, if there is one."""
    for name in _SYSTEM:
        text = fields.get(name)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise Fault(f"the field {name!r} is a {type(text).__name__}, not a text")
        first = turns.messages[0]
        if first["role"] == "system":
            if first["content"] != text:
                raise Fault(f"has one system text in {name!r} and another in the messages")
            continue
        check_content(text)
        rest, turns = turns, Turns()
        turns.add({"role": "system", "content": text}, False)
        turns.extend(rest)
    return turns


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    """Return the variables of the template that the record itself sets."""
    given = fields.get("chat_template_kwargs")
    kwargs = {} if given in (None, "") else decoded(given, "chat_template_kwargs")
    if not isinstance(kwargs, dict):
        raise Fault("'chat_template_kwargs' must be an object")
    found = dict(kwargs)
    for key in ("enable_thinking", "documents"):
        value = decoded(fields.get(key), key) if fields.get(key) != "" else None
        if value is not None and found.setdefault(key, value) != value:
            raise Fault(f"says one thing in {key!r} and another in 'chat_template_kwargs'")
    if not isinstance(found.get("enable_thinking", False), bool):
        raise Fault("'enable_thinking' must be true or false")
    if not isinstance(found.get("documents", []), list):
        raise Fault("'documents' must be a list")
    for key in _RESERVED:
        if key in found:
            raise Fault(f"'chat_template_kwargs' must not hold {key!r}, which a record cannot set")
    check_values(found)
    return found


def _messages_of(name: str) -> _Layout:
    def matches(fields: Fields) -> bool:
        value = fields.get(name)
        if name == "messages":
            return value is not None
        # A transcript in plain text may have this name too.
        return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))

    return _Layout(name, matches, lambda fields: read_messages(fields[name], name), _BESIDE | {name})


def _read_completion(fields: Fields) -> Turns:
    """Return prompt and completion; only the answers of the completion are learned."""
    turns = Turns()
    if fields["prompt"]:
        turns.extend(read_messages(fields["prompt"], "prompt"), learn=False)
    turns.extend(read_messages(fields["completion"], "completion"))
    return turns


def _read_chosen(fields: Fields) -> Turns:
    """Return the chosen answer, after its prompt.

    A list that begins with the prompt itself is the whole conversation, and its last answer is learned.
    """
    chosen = read_messages(fields[CHOSEN], CHOSEN)
    if chosen.messages[-1]["role"] != "assistant":
        raise Fault("'chosen' must end with the assistant's answer")
    turns = Turns()
    if chosen.messages[0]["role"] != "assistant" or not fields.get("prompt"):
        turns.extend(chosen, learn=False)
        turns.is_learned[-1] = chosen.is_learned[-1]
        return turns
    prompt = fields["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns.extend(read_messages(prompt, "prompt"), learn=False)
    turns.extend(chosen)
    return turns


def _read_calls(fields: Fields) -> Turns:
    """Return a question and the calls that answer it."""
    answers = decoded(fields["answers"], "answers")
    if answers == []:
        raise Fault("'answers' must hold at least one call")
    question = {"role": "user", "content": text_field(fields, "query")}
    return read_messages([question, {"role": "assistant", "tool_calls": answers}], "query and answers")


def _is_list(value: object) -> bool:
    return isinstance(value, list)


# The first layout that matches is taken.
_LAYOUTS = (
    *map(_messages_of, _LISTS),
    _Layout(
        "prompt and completion (lists of messages)",
        lambda fields: _is_list(fields.get("prompt")) and _is_list(fields.get("completion")),
        _read_completion,
        _BESIDE | {"prompt", "completion"},
    ),
    _Layout(
        "query, tools, answers",
        lambda fields: fields.keys() >= {"query", "tools", "answers"},
        _read_calls,
        _BESIDE | {"query", "answers"},
    ),
)
_PREFERENCE = _Layout(
    "with --response-key chosen also chosen (a list of messages), maybe prompt",
    lambda fields: _is_list(fields.get(CHOSEN)),
    _read_chosen,
    _BESIDE | {CHOSEN, "rejected", "prompt", "messages"},
)
