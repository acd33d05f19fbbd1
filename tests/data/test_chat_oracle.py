"""What is learned from conversations: for each behaviour of a template and kind of conversation."""

from __future__ import annotations

import pytest

from megatron_fdd.data.refusals import Reason
from tests.data.chat_templates import FAMILIES
from tests.data.chats_by_hand import (
    DEEP,
    DEEP_END,
    DEEP_OSLO,
    DROPPED,
    GLM,
    KIND,
    KINDS,
    Q2,
    ROWS,
    SUM,
    SUM2,
    TODAY,
    WHERE_THERE,
    Expected,
    Q,
    conversation,
    expected,
    outcome,
    written_out,
)


@pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for family, rows in ROWS.items() for kind in rows], ids="{0}".format
)
def test_samples_are_those_worked_out_by_hand(family: str, kind: str) -> None:
    got = outcome(FAMILIES[family].template(), KINDS[kind])
    assert got == expected(ROWS[family][kind])


@pytest.mark.parametrize(
    ("family", "kind", "row"),
    [
        ("qwen2.5", "multi", KIND + Q + "There.›\n" + Q2 + "⟦Here.›⟧"),
        ("qwen2.5", "ends with a question", KIND + Q + "⟦There.›⟧"),
        ("qwen2.5", "last skipped", KIND + Q + "⟦There.›⟧"),
        ("qwen2.5", "empty, then one", KIND + "‹user\nWhere?›\n‹assistant\n›\n" + Q2 + "⟦Here.›⟧"),
        # A template that drops a part of an earlier answer drops it at inference, too.
        ("qwen3", "reasoning", SUM + "4›\n" + SUM2 + "⟦<think>\nagain\n</think>\n\n6›⟧"),
        ("qwq", "reasoning inline", SUM + "4›\n" + SUM2 + "<think>\n⟦again\n</think>\n\n6›⟧"),
        ("mistral-v0.3", "system", DROPPED["system"]),
        ("nemo", "system multi", "<s>[INST]Where?[/INST]There.</s>[INST]Be brief.\n\nNow?[/INST]⟦Here.</s>⟧"),
        ("glm", "multi", GLM + "\n<think></think>\nThere.<|user|>\nNow?<|assistant|>"
         "⟦\n<think></think>\nHere.<|user|>⟧"),
    ],
)  # fmt: skip
def test_the_last_answer_alone(family: str, kind: str, row: Expected) -> None:
    got = outcome(FAMILIES[family].template(), KINDS[kind], turns="last")
    assert got == expected(row)


@pytest.mark.parametrize(
    ("family", "kind", "allowed", "row"),
    [
        ("qwen2.5", "reasoning", "reasoning", KIND + SUM + "⟦4›⟧\n" + SUM2 + "⟦6›⟧"),
        ("llama3", "call beside words", "tool_calls", "◂«user»Oslo?◆«assistant»⟦Looking.◆⟧"),
        ("llama3", "call", "tools", DROPPED["tool_calls"]),
        ("llama3.1", "call beside words", "tool_calls", DROPPED["content"]),
        ("llama3.1", "call beside words", "content", TODAY
         + '◆«user»Oslo?◆«assistant»⟦{"name": "w", "parameters": {"city": "Oslo"}}◆⟧'),
        ("mistral-v0.3", "system", "system", "<s>[INST]Where?[/INST]⟦There.</s>⟧"),
        ("phi3", "result only", "tool", "<|user|>\nOslo?<|end|>\n<|assistant|>\n⟦Looking.<|end|>⟧\n"
         "<|assistant|>\n⟦It rains.<|end|>⟧"),
        ("deepseek", "reasoning", "reasoning", DEEP
         + f"<｜User｜>2+2?<｜Assistant｜>⟦4{DEEP_END}⟧<｜User｜>3+3?<｜Assistant｜>⟦6{DEEP_END}⟧"),
        ("deepseek", "call", "tools", DEEP
         + f"<｜User｜>Oslo?<｜Assistant｜>⟦{DEEP_OSLO}⟧<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>"
         f"⟦It rains.{DEEP_END}⟧"),
        ("r1-distill", "reasoning inline", "reasoning", Reason.NOT_FOLLOWED),
        # Without its call only the end is left to learn.
        ("llama3", "call without schema", "tool_calls", Reason.EMPTY),
    ],
)  # fmt: skip
def test_what_may_be_dropped(family: str, kind: str, allowed: str, row: Expected) -> None:
    got = outcome(FAMILIES[family].template(), KINDS[kind], allowed=frozenset({allowed}))
    assert got == expected(row)


def test_a_switch_of_the_record_wins_over_the_flag() -> None:
    flagged = FAMILIES["qwen3"].template(enable_thinking=True)
    assert outcome(flagged, KINDS["no thinking"]) == written_out(Q + "{none}⟦There.›⟧")
    assert outcome(flagged, KINDS["single"]) == written_out(Q + "⟦{none}There.›⟧")
    flagged = FAMILIES["qwen3"].template(enable_thinking=False)
    assert outcome(flagged, KINDS["single"]) == written_out(Q + "{none}⟦There.›⟧")
    asked = conversation(*WHERE_THERE, enable_thinking=True)
    assert outcome(flagged, asked) == written_out(Q + "⟦{none}There.›⟧")
