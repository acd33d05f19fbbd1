"""Conversations of which a template leaves something out, and what a template may raise."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from megatron_fdd.data.chat import ChatSampler
from megatron_fdd.data.chat_template import ChatSettings, ChatTemplate
from megatron_fdd.data.conversations import Conversation
from megatron_fdd.data.refusals import Reason, Refusal
from tests.data.chat_templates import CHATML, QWEN2_5, chat_template
from tests.data.chats_by_hand import (
    BRIEF,
    KINDS,
    NOW_HERE,
    OSLO,
    RAINS,
    SUMS,
    TOOL,
    WHERE,
    WHERE_THERE,
    Q,
    answer,
    call,
    conversation,
    outcome,
    user,
    written_out,
)


def test_a_field_that_only_a_switch_writes_is_looked_for_under_each_setting_of_it() -> None:
    """Two conversations that differ only in the switch, one after the other with the same sampler."""
    text = CHATML.replace(
        "m.content", '(m.reasoning_content + "=" if keep and m.reasoning_content else "") + m.content'
    )
    sampler = ChatSampler(chat_template(text), ChatSettings())
    (kept,) = sampler.samples(conversation(*SUMS[:2], keep=True), WHERE, Counter())
    assert kept.text.endswith("add=4<|im_end|>")
    with pytest.raises(Refusal, match=r"reasoning of message 2"):
        sampler.samples(conversation(*SUMS[:2], keep=False), WHERE, Counter())


def test_a_schema_beyond_the_first_that_is_not_written_is_missed_at_once() -> None:
    """gpt-oss writes only the first call, for example: what holds for one schema need not hold for two."""
    text = "{{ tools[0] | tojson if tools }}" + CHATML
    sampler = ChatSampler(chat_template(text), ChatSettings())
    one = conversation(*WHERE_THERE, tools=True)
    assert sampler.samples(one, WHERE, Counter())
    other = {"type": "function", "function": {"name": "v", "description": "", "parameters": {}}}
    with pytest.raises(Refusal, match=r"schema of 'v' \(tools\)"):
        sampler.samples(replace(one, tools=(TOOL, other)), WHERE, Counter())


def test_a_template_for_tools_is_used_with_tools_only() -> None:
    named = chat_template({"default": CHATML, "tool_use": QWEN2_5})
    assert outcome(named, KINDS["single"]) == written_out(Q + "⟦There.›⟧")
    assert outcome(named, KINDS["schema only"]) == written_out(
        "‹system\nBe kind.\n{tool}›\n" + Q + "⟦There.›⟧"
    )
    assert outcome(chat_template({"default": QWEN2_5}), KINDS["schema only"]) == outcome(
        named, KINDS["schema only"]
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ m.content + 1 }}", "TypeError: can only concatenate"),
        ("{{ 'a' * (9000000 * 9000000) }}", "TemplateLimitError: it takes more than 512 MiB of memory"),
        ("{% for i in range(9000000) %}{% endfor %}", "OverflowError"),
        ("{{ 10 ** 2 }}", "ValueError: it has a power"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion depth"),
        ("{{ nothing.more }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ raise_exception('not this') }}", "TemplateError: not this"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
    ids=lambda text: text.split(":")[0].replace(" ", ""),
)
def test_whatever_a_template_raises_is_a_refusal_with_the_place(line: str, said: str) -> None:
    template = "{% for m in messages %}" + line + "{% endfor %}"
    with pytest.raises(Refusal, match=rf"^x\.jsonl, line 1: the chat template refuses it \({said}") as caught:
        ChatSampler(chat_template(template), ChatSettings()).samples(KINDS["single"], WHERE, Counter())
    assert caught.value.reason is Reason.RAISED


def test_what_is_raised_for_one_conversation_leaves_the_next_one_alone() -> None:
    template = chat_template(
        "{% for m in messages if m.role == 'user' %}{{ m.content.index('W') }}{% endfor %}" + CHATML
    )
    sampler = ChatSampler(template, ChatSettings())
    with pytest.raises(Refusal, match="ValueError: substring not found"):
        sampler.samples(KINDS["same words"], WHERE, Counter())
    (sample,) = sampler.samples(KINDS["single"], WHERE, Counter())
    assert sample.text.startswith("0<|im_start|>user\nWhere?")


def test_every_field_that_is_dropped_is_named_once() -> None:
    chat = conversation(user("Oslo?"), answer("", "Hm.", [call("Oslo"), call("Rome")]), tools=True)
    with pytest.raises(Refusal) as refused:
        ChatSampler(chat_template(CHATML), ChatSettings(allowed=frozenset({"content"}))).samples(
            chat, WHERE, Counter()
        )
    assert re.findall(r"\((\w+)\)[,:]", refused.value.detail) == ["reasoning", "tool_calls", "tools"]
    assert refused.value.detail.endswith("the chat template does not write them")


def test_a_call_that_is_only_context_must_be_written_too() -> None:
    chat = conversation(*OSLO, RAINS, skipped=(1,))
    assert outcome(chat_template(CHATML), chat) == "drops tool_calls"


LONG = " ".join(f"word{number}" for number in range(60))


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("m.content[:20] + m.content[-20:]", None),  # both ends are there, each with its mark: not noticed
        ("m.content[:20]", "user content"),
        ("m.content[-20:]", "user content"),
        ("m.content.split('###')[-1]", "user content"),
        ("m.content | lower", None),
        ("m.content | tojson", None),
        ("m.content if loop.index0 > 1 else m.content[:3]", "user content"),
    ],
)
def test_a_long_text_must_be_written_from_its_beginning_to_its_end(content: str, field: str | None) -> None:
    text = CHATML.replace("m.content", "(" + content + ")")
    long = LONG.replace("word30", "### word30")
    chat = conversation(user(long), answer(long), user(long.upper()), answer(long.title()))
    got = outcome_of_fields(chat_template(text), chat)
    assert got == (None if field is None else field.split())


def outcome_of_fields(template: ChatTemplate, chat: Conversation) -> list[str] | None:
    try:
        ChatSampler(template, ChatSettings()).samples(chat, WHERE, Counter())
    except Refusal as refusal:
        if refusal.reason is not Reason.DROPPED:
            raise
        return re.findall(r"\((\w+)\)[,:]", refusal.detail)
    return None


def test_one_record_says_nothing_of_the_next() -> None:
    """A short text is written whole, a long one is not, in whatever order they come."""
    text = CHATML.replace("m.content", "m.content[:40]")
    short, long = conversation(user("a"), answer("b")), conversation(user("a"), answer(LONG))
    for chats in ((short, long, short), (long, short, long)):
        sampler = ChatSampler(chat_template(text), ChatSettings())
        taken = []
        for chat in chats:
            try:
                sampler.samples(chat, WHERE, Counter())
                taken.append("short")
            except Refusal:
                taken.append("long")
        assert taken == ["short" if chat is short else "long" for chat in chats]


def test_what_is_written_before_the_first_answer_must_stay_before_the_later_ones() -> None:
    window = CHATML.replace("for m in messages", "for m in messages[-3:]")
    chat = conversation(BRIEF, *WHERE_THERE, *NOW_HERE)
    assert outcome_of_fields(chat_template(window), chat) == ["system"]


@pytest.mark.parametrize(
    ("content", "field"),
    [("Before <think>r</think> after", "content"), ("<think>a</think>b</think>c", "reasoning")],
)
def test_words_around_reasoning_must_be_written(content: str, field: str) -> None:
    """The template takes the text before the last end of reasoning and after the last start, as Qwen3 does."""
    text = CHATML.replace(
        "m.content",
        "((m.content.split('</think>')[0].split('<think>')[-1] + '</think>' + m.content.split('</think>')[-1])"
        " if '</think>' in m.content else m.content)",
    )
    assert outcome_of_fields(chat_template(text), conversation(user("?"), answer(content))) == [field]


@pytest.mark.parametrize(
    "content", ["</think>", "<think></think>", "<think>only</think>", "<think>\n</think>\n\n "]
)
def test_an_answer_without_a_word_is_refused(content: str) -> None:
    assert outcome(chat_template(CHATML), conversation(user("?"), answer(content))) is Reason.EMPTY


def test_all_of_a_schema_must_be_written() -> None:
    names = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHATML
    assert outcome(chat_template(names), conversation(*WHERE_THERE, tools=True)) == "drops tools"
