"""What is learned where a template ends no turn, and where its `{% generation %}` marks say it."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_fdd.data.chat import ANSWERS, MARKS_ALONE, ChatSampler
from megatron_fdd.data.chat_template import ChatSettings
from megatron_fdd.data.refusals import Reason
from tests.data.chat_templates import chat_template, joined
from tests.data.chats_by_hand import (
    KINDS,
    Q2,
    WHERE,
    Expected,
    Q,
    expected,
    outcome,
)

# A template that ends no turn, and opens the next one with a line break.
NO_END = joined(r"""
{% for m in messages %}{{ "\n" if not loop.first }}{{ "<|" + m.role + "|>" + m.content }}{% endfor %}
{{ "\n<|assistant|>" if add_generation_prompt }}
""")


def test_what_stands_before_the_next_marker_is_said_with_it() -> None:
    template = chat_template(NO_END, "<|user|> <|assistant|>", "<|endoftext|>")
    got = outcome(template, KINDS["multi"])
    assert got == "<|user|>Where?\n<|assistant|>⟦There.\n<|user|>⟧Now?\n<|assistant|>⟦Here.\n<|user|>⟧"


def test_an_answer_behind_a_header_does_not_stand_in_for_one_behind_none() -> None:
    """A result's prompt has no header here, and no end of turn once there is an answer (as in Gemma's newest)."""
    text = joined(r"""
    {% for m in messages %}{{ "<|im_start|>" + m.role + "\n" + m.content }}
    {{ "<|im_end|>\n" if m.role != "tool" or loop.last }}{% endfor %}
    {{ "<|im_start|>assistant\n" if add_generation_prompt and messages[-1].role != "tool" }}
    """)
    assert outcome(chat_template(text), KINDS["result only"]) is Reason.NOT_FOLLOWED


def test_no_end_and_no_marker_is_refused() -> None:
    template = chat_template(NO_END, "<|im_start|>", "<|endoftext|>")
    assert outcome(template, KINDS["single"]) is Reason.NO_STOP


def marked(before: str, after: str) -> str:
    """Return ChatML with marks where `before` and `after` place them among `‹role\n`, `text` and `›\n`."""
    return joined(
        r"""
    {% for m in messages %}{% if m.role == "assistant" %}
    """
        + before
        + r"""
    {% else %}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{% endif %}{% endfor %}
    """
        + after
    )


PROMPT = r"""{{ "<|im_start|>assistant\n" if add_generation_prompt }}"""
ON, OFF = "{% generation %}", "{% endgeneration %}"
HEADER, WORDS, END = r"""{{ "<|im_start|>assistant\n" }}""", "{{ m.content }}", r"""{{ "<|im_end|>\n" }}"""


@pytest.mark.parametrize(
    ("template", "kind", "row"),
    [
        # Marks narrow what follows the generation prompt.
        (marked(HEADER + ON + WORDS + OFF + END, PROMPT), "multi",
         Q + "⟦There.⟧›\n" + Q2 + "⟦Here.⟧›"),
        (marked(ON + HEADER + WORDS + END + OFF, PROMPT), "multi",
         Q + "⟦There.›⟧\n" + Q2 + "⟦Here.›⟧"),
        (marked(ON + HEADER + WORDS + END + OFF, PROMPT), "middle skipped",
         Q + "⟦There.›⟧\n" + Q2 + "Here.›\n‹user\nThen?›\n‹assistant\n⟦Gone.›⟧"),
        (marked(HEADER + "{% if loop.last %}" + ON + WORDS + END + OFF + "{% else %}" + WORDS + END + "{% endif %}",
                PROMPT), "multi",
         Q + "There.›\n" + Q2 + "⟦Here.›⟧"),
        (marked(HEADER + ON + WORDS[:-2] + "[:2] }}" + OFF + WORDS[:-2] + "[2:] }}" + END, PROMPT), "unicode",
         "‹user\ne\u0301 🙂›\n‹assistant\n⟦🙂\u0301⟧ and e\u0301›\n‹user\n\u0301›\n‹assistant\n⟦\u0301東⟧›"),
        (marked(HEADER + ON + OFF + WORDS + END, PROMPT), "single", Reason.NOTHING_LEARNED),
        # Marks that touch are one.
        (marked(HEADER + ON + WORDS + OFF + ON + END + OFF, PROMPT), "single", Q + "⟦There.›⟧"),
        # A mark in a comment does not count.
        (marked(HEADER + "{# " + ON + WORDS + OFF + " #}" + WORDS + END, PROMPT), "single", Q + "⟦There.›⟧"),
        # The text is rendered first and written later, so the places of the marks are unknown.
        ("{% macro say(m) %}" + ON + WORDS + END + OFF + "{% endmacro %}" + marked(HEADER + "{{ say(m) }}", PROMPT),
         "single", Reason.RAISED),
        (marked("{% set all %}" + ON + WORDS + END + OFF + "{% endset %}" + HEADER + "{{ all }}", PROMPT),
         "single", Reason.RAISED),
        # The answer does not follow its prompt, so only the marks tell where it is.
        (marked(HEADER + ON + WORDS + END + OFF, PROMPT + "{{ 'Now: ' if add_generation_prompt }}"), "multi",
         Q + "⟦There.›⟧\n" + Q2 + "⟦Here.›⟧"),
        (marked(HEADER + ON + WORDS + END + OFF, PROMPT + "{{ 'Now: ' if add_generation_prompt }}"), "middle skipped",
         Q + "⟦There.›⟧\n" + Q2 + "Here.›\n‹user\nThen?›\n‹assistant\n⟦Gone.›⟧"),
        (marked("{% if loop.last %}" + ON + HEADER + WORDS + END + OFF + "{% else %}" + HEADER + WORDS + END
                + "{% endif %}", PROMPT + "{{ 'Now: ' if add_generation_prompt }}"), "multi",
         Reason.NOT_FOLLOWED),
    ],
    ids="narrow wide skipped last-only inside empty touching comment macro set alone alone-skipped alone-few".split(),
)  # fmt: skip
def test_generation_marks(template: str, kind: str, row: Expected) -> None:
    got = outcome(chat_template(template), KINDS[kind])
    assert got == expected(row)


def test_marks_alone_learn_the_last_answer_alone() -> None:
    template = marked(HEADER + ON + WORDS + END + OFF, PROMPT + "{{ 'Now: ' if add_generation_prompt }}")
    got = outcome(chat_template(template), KINDS["multi"], turns="last")
    assert got == expected(Q + "There.›\n" + Q2 + "⟦Here.›⟧")


def test_marks_narrow_an_answer_that_no_token_ends() -> None:
    """The template is like those of GLM that were edited for training."""
    template = NO_END.replace(
        '{{ "<|" + m.role + "|>" + m.content }}',
        '{{ "<|" + m.role + "|>" }}{% if m.role == "assistant" %}{{ m.content[:2] }}{% generation %}{{ m.content[2:] }}'
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}",
    )
    got = outcome(chat_template(template, "<|user|> <|assistant|>", "<|endoftext|>"), KINDS["single"])
    assert got == "<|user|>Where?\n<|assistant|>Th⟦ere.\n<|user|>⟧"


def test_answers_that_only_marks_tell_are_counted() -> None:
    template = marked(HEADER + ON + WORDS + END + OFF, PROMPT + "{{ 'Now: ' if add_generation_prompt }}")
    notes: Counter[str] = Counter()
    ChatSampler(chat_template(template), ChatSettings()).samples(KINDS["multi"], WHERE, notes)
    assert notes[MARKS_ALONE] == notes[ANSWERS] == 2
