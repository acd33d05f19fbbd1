"""A chat template at work: what it writes for a conversation, which marks it has, and which tokens end a turn.

The text is the one of transformers' `apply_chat_template`, whose renderer is used. This module adds the date (a
template may ask for today's), templates by name, and a call's arguments as text where a template takes no objects.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from megatron_fdd.data.conversations import Conversation
from megatron_fdd.data.messages import Message
from megatron_fdd.data.render_limits import TemplateLimitError, check_length, limited
from megatron_fdd.data.template_source import compiled, mark_places

Turns = Literal["all", "last"]
Spans = list[tuple[int, int]]
# How many messages to write, and options of transformers' renderer.
Wanted = tuple[int, Mapping[str, bool]]
_OURS = {
    "messages",
    "conversations",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
}
# Texts for probes. No template looks for them.
_ASKED, _SAID = "qkzj", "vxwq"
_TOOL = {
    "type": "function",
    "function": {
        "name": _ASKED,
        "description": _SAID,
        "parameters": {"type": "object", "properties": {_SAID: {"type": "string"}}},
    },
}
_CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": _ASKED, "arguments": {_SAID: _SAID}}}
_USER: Message = {"role": "user", "content": _ASKED}
_ANSWER: Message = {"role": "assistant", "content": _SAID}
_CALLING: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: Message = {"role": "tool", "name": _ASKED, "tool_call_id": "a1b2c3d4e", "content": _SAID}


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """A user's settings for chats, apart from the template itself.

    Attributes:
        variables: --chat-template-kwargs: switches of the template, such as `enable_thinking`.
        date: --chat-date: the day that a template writes if it writes today's date.
        turns: --chat-turns: learn all answers, or only the last one of a conversation.
        allowed: --allow-dropped: fields that the template may drop (`vanished.FIELDS`).
        place: where the template is from, for messages: its file, or "of" and the tokenizer's folder.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date = field(default_factory=datetime.date.today)
    turns: Turns = "all"
    allowed: frozenset[str] = frozenset()
    place: str = field(default="", repr=False)  # no part of what decides the samples

    def __post_init__(self) -> None:
        """Refuse variables that every chat has already, and an `enable_thinking` that is neither true nor false.

        Raises:
            ValueError: names the variables.
        """
        taken = sorted(name for name in self.variables if name in _OURS or name.endswith("_token"))
        if taken:
            raise ValueError(
                f"--chat-template-kwargs: {', '.join(taken)} come from the data or the tokenizer; leave them out"
            )
        thinking = self.variables.get("enable_thinking", False)
        if not isinstance(thinking, bool):
            raise ValueError(
                f"--chat-template-kwargs: enable_thinking is {thinking!r}; it must be true or false"
            )


@dataclass(frozen=True)
class ChatTemplate:
    """A template with everything it is given besides a conversation; can be pickled.

    Attributes:
        text: jinja; or several templates by name, of which `tool_use` serves conversations with tools.
        special_tokens: variables such as `bos_token`, as the tokenizer has them.
        added_tokens: texts of the tokenizer's added tokens; true means a special token.
        stop_tokens: texts at which a generation stops: the tokenizer's end token, and those of the model's
            `generation_config.json`.
        variables: --chat-template-kwargs; a record's own variables override them.
        date: the day that `strftime_now` formats.
        place: as in `ChatSettings`.
    """

    text: str | Mapping[str, str]
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    added_tokens: Mapping[str, bool] = field(default_factory=dict)
    stop_tokens: frozenset[str] = frozenset()
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date = field(default_factory=datetime.date.today)
    place: str = ""

    @property
    def told(self) -> str:
        """What a message calls it."""
        return f"the chat template {self.place}".rstrip()

    def render(self, conversation: Conversation, count: int, *, prompt: bool) -> str:
        """Return the text of the first `count` messages; with `prompt` it ends where the model begins to answer.

        Raises: whatever the template raises, which is somebody else's program.
        """
        [(text, _)] = self._render(conversation, (count, {"add_generation_prompt": prompt}))
        return text

    def before_and_with(self, conversation: Conversation, index: int) -> tuple[str, str]:
        """Return the text before a message, where the model begins to answer, and the text with it.

        Raises: as `render`, which would go to the other process and back twice.
        """
        asked, whole = (index, {"add_generation_prompt": True}), (index + 1, {"add_generation_prompt": False})
        (before, _), (text, _) = self._render(conversation, asked, whole)
        return before, text

    def marks(self, conversation: Conversation) -> Spans:
        """Return where text between `{% generation %}` and `{% endgeneration %}` is in the whole conversation.

        Raises:
            ValueError: the template has marks whose place in the text cannot be known.
        """
        source = self.source(conversation.tools is not None)
        if mark_places(source) == "apart":
            raise ValueError(
                "its {% generation %} marks stand in a macro or a captured block, where their place in the text is lost"
            )
        wanted = len(conversation.messages), {"return_assistant_tokens_mask": True}
        [(_, spans)] = self._render(conversation, wanted)
        return spans

    def has_marks(self, *, with_tools: bool) -> bool:
        """Whether the template marks what the assistant says; a mark inside a comment does not count."""
        return mark_places(self.source(with_tools)) != "none"

    def source(self, with_tools: bool) -> str:
        """Return the template that is used.

        Raises:
            ValueError: there are several templates by name, and none is called default.
        """
        if isinstance(self.text, str):
            return self.text
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self.text:
                return self.text[name]
        raise ValueError(f"the tokenizer has the chat templates {sorted(self.text)} and none called default")

    @property
    def uses_date(self) -> bool:
        """Whether every sample contains the date."""
        sources = [self.text] if isinstance(self.text, str) else self.text.values()
        return any("strftime_now" in source for source in sources)

    @cached_property
    def ends(self) -> frozenset[str]:
        """Tokens that end an answer: those of the tokenizer and the model, and those that this template writes last.

        Special tokens after the words of an answer count (`<|im_end|>`, `<end_of_turn>`), and the last one after a
        call (`<|call|>`): other tokens after a call may close the call itself.
        """
        found = set(self.stop_tokens)
        said = self._probe([_USER, _ANSWER], None) or ""
        rest = said[max(said.rfind(_SAID), 0) :]
        while (token := self._special_at_end(rest.rstrip())) is not None:
            found.add(token)
            rest = rest.rstrip().removesuffix(token)
        called = self._probe([_USER, _CALLING], (_TOOL,)) or ""
        return frozenset((found | {self._special_at_end(called.rstrip()) or ""}) - {""})

    def opening(self, *, after_call: bool) -> str | None:
        """Return the token with which the next turn opens, with the white space that the template writes before it.

        It ends an answer in a template that has no end token of its own. None: the next turn opens with no token.
        """
        first, second = ([_USER, _CALLING], _RESULT) if after_call else ([_USER, _ANSWER], _USER)
        tools = (_TOOL,) if after_call else None
        before, after = self._probe(first, tools), self._probe([*first, second], tools)
        if before is None or after is None or not after.startswith(before):
            return None
        rest = after[len(before) :]
        opened = rest.lstrip()
        tokens = [token for token in self.added_tokens if opened.startswith(token)]
        return rest[: len(rest) - len(opened)] + max(tokens, key=len) if tokens else None

    @cached_property
    def preamble(self) -> str:
        """What the template itself writes before a conversation: a default system text, a date; mostly nothing."""
        text = ""
        with suppress(TemplateLimitError):  # the samples are there; this is only told
            text = self._probe([_USER, _ANSWER, _USER], None) or ""
        before = text[: max(text.find(_ASKED), 0)].removeprefix(str(self.special_tokens.get("bos_token", "")))
        header = text[text.rfind(_SAID) + len(_SAID) : max(text.rfind(_ASKED), 0)]  # of a later question
        return before.removesuffix(os.path.commonprefix([before[::-1], header[::-1]])[::-1])

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether a call's arguments may be an object; some templates add them to a text and need JSON text."""
        if self._probe([_USER, _CALLING], (_TOOL,)) is not None:
            return True
        return self._probe([_USER, _with_text_arguments(_CALLING)], (_TOOL,)) is None

    def _special_at_end(self, text: str) -> str | None:
        special = (token for token, is_special in self.added_tokens.items() if is_special)
        return max((token for token in special if text.endswith(token)), key=len, default=None)

    def _probe(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str | None:
        """Return the text of a conversation of ours; None where the template refuses it.

        Raises:
            TemplateLimitError: it would take too long, or too much memory, for every conversation.
        """
        source = self.source(tools is not None)
        try:
            [(text, _)] = self._render_source(source, messages, tools, {}, [(len(messages), {})])
        except TemplateLimitError:
            raise
        except Exception:  # the template has no calls, or not these roles
            return None
        return text

    def _render(self, conversation: Conversation, *wanted: Wanted) -> list[tuple[str, Spans]]:
        messages: Sequence[Message] = conversation.messages[: max(count for count, _ in wanted)]
        if any("tool_calls" in message for message in messages) and not self._takes_objects:
            messages = [_with_text_arguments(message) for message in messages]
        source = self.source(conversation.tools is not None)
        return self._render_source(source, messages, conversation.tools, conversation.template_kwargs, wanted)

    def _render_source(
        self,
        source: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        own: Mapping[str, Any],
        wanted: Sequence[Wanted],
    ) -> list[tuple[str, Spans]]:
        variables = {**self.special_tokens, **self.variables, **own}
        given = list(messages), None if tools is None else list(tools), variables
        rendered: list[tuple[str, Spans]] = limited(source, _rendered, source, self.date, *given, wanted)
        return rendered


def _rendered(
    source: str,
    date: datetime.date,
    messages: list[Message],
    tools: list[Any] | None,
    variables: Mapping[str, Any],
    wanted: Sequence[Wanted],
) -> list[tuple[str, Spans]]:
    """Return texts, and the spans of marks where they are asked for; runs in the process for templates."""
    from transformers.utils.chat_template_utils import render_jinja_template

    compiled(source).environment.globals["strftime_now"] = date.strftime
    found = []
    for count, options in wanted:
        rendered: Any = render_jinja_template(
            conversations=[messages[:count]], tools=tools, chat_template=source, **{**variables, **options}
        )
        [text], spans = rendered
        check_length(text)
        found.append((text, spans[0] if spans else []))
    return found


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
