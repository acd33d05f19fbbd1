"""Conversations to token ids and the mask of what the assistant says.

The template decides the text; the mask says which of its tokens the model has to produce. With a template
that marks the assistant's words itself (`{% generation %}`) that mark is used. With any other the mask comes
from prefixes: what the template renders up to an assistant turn (with its generation prompt) must be the
beginning of what it renders with that turn, token by token; if not, there is no honest mask.
"""

from __future__ import annotations

import re

import jinja2
import numpy as np

from megatron_fdd.data.tokenizer import HuggingFaceText, Message, TextTokenizer

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def parse_messages(value: object, where: str) -> list[Message]:
    """Check the `messages` field of a line.

    Raises:
        ValueError: not a list of {"role": ..., "content": ...} with texts, or it begins with the assistant.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: 'messages' must be a list with at least one message")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"{where}: message {number} must have the texts 'role' and 'content'")
    if value[0]["role"] == "assistant":
        raise ValueError(f"{where}: the conversation begins with the assistant; it must begin with a prompt")
    return value


def encode_chat(
    tokenizer: TextTokenizer, messages: list[Message], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (int32) and loss mask (uint8, 1 where the assistant speaks), both of the same length.

    Raises:
        ValueError: no chat template, a template that refuses the conversation, or one whose prefixes do not
            agree (it rewrites earlier turns); names file and line.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: a chat needs a chat template and this tokenizer has none; give one with "
            "--chat-template, or use the fields prompt and response"
        )
    try:
        if isinstance(tokenizer, HuggingFaceText) and _GENERATION_MARK.search(tokenizer.chat_template):
            ids, mask = tokenizer.marked_ids(messages)
            return np.array(ids, np.int32), np.array(mask, np.uint8)
        return _encode_by_prefixes(tokenizer, messages, where)
    except jinja2.TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses this conversation: {error}") from error


def _encode_by_prefixes(
    tokenizer: TextTokenizer, messages: list[Message], where: str
) -> tuple[np.ndarray, np.ndarray]:
    def render(count: int, prompt: bool) -> list[int]:
        return tokenizer.plain_ids(tokenizer.render(messages[:count], add_generation_prompt=prompt))

    ids = render(len(messages), False)
    mask = np.zeros(len(ids), np.uint8)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(turn, True), render(turn + 1, False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise ValueError(
                f"{where}: the chat template renders message {turn + 1} differently once the conversation "
                "goes on, so the assistant's tokens cannot be told apart; give a template with "
                "{% generation %} marks (--chat-template), or split the conversation"
            )
        mask[len(before) : _end_of_turn(tokenizer, ids, len(before), len(after))] = 1
    return np.array(ids, np.int32), mask


def _end_of_turn(tokenizer: TextTokenizer, ids: list[int], start: int, end: int) -> int:
    """Leave out the white space that templates put after the closing token: no model has to produce it."""
    last = end
    while last > start and not tokenizer.text([ids[last - 1]]).strip():
        last -= 1
    closed = last > start and ids[last - 1] in tokenizer.special_ids()
    return last if closed else end
