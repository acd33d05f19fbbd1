"""Conversations of each kind, and what each template teaches of them, worked out by hand.

An expected text is what the model sees at inference; between ⟦ and ⟧ stands what it has to say itself, with the
token at which it stops. It was worked out from the template and from that sentence, never from the output of the
code.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from megatron_fdd.data.chat import ChatSampler
from megatron_fdd.data.chat_template import ChatSettings, ChatTemplate, Turns
from megatron_fdd.data.conversations import Conversation, Message
from megatron_fdd.data.refusals import Reason, Refusal

WHERE = "x.jsonl, line 1"
TOOL = {
    "type": "function",
    "function": {
        "name": "w",
        "description": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
# Short forms of texts that would fill the lines.
SHORT = {
    "‹": "<|im_start|>",
    "›": "<|im_end|>",
    "«": "<|start_header_id|>",
    "»": "<|end_header_id|>\n\n",
    "◂": "<|begin_of_text|>",
    "◆": "<|eot_id|>",
    "{tool}": '{"type": "function", "function": {"name": "w", "description": "weather", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}',
    "{oslo}": '<tool_call>{"name": "w", "arguments": {"city": "Oslo"}}</tool_call>',
    "{rome}": '<tool_call>{"name": "w", "arguments": {"city": "Rome"}}</tool_call>',
    "{none}": "<think>\n\n</think>\n\n",
    "{rain}": "‹user\n<tool_response>rain</tool_response>›\n‹assistant\n",
}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str, reasoning: str | None = None, calls: list[Message] | None = None) -> Message:
    message: Message = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls is not None:
        message["tool_calls"] = calls
    return message


def call(city: str, call_id: str = "abcdefgh1") -> Message:
    return {"type": "function", "id": call_id, "function": {"name": "w", "arguments": {"city": city}}}


def result(text: str, call_id: str = "abcdefgh1") -> Message:
    return {"role": "tool", "name": "w", "tool_call_id": call_id, "content": text}


def conversation(
    *messages: Message, skipped: tuple[int, ...] = (), tools: bool = False, **variables: Any
) -> Conversation:
    learned = tuple(m["role"] == "assistant" and i not in skipped for i, m in enumerate(messages))
    return Conversation(messages, learned, (TOOL,) if tools else None, variables)


BRIEF: Message = {"role": "system", "content": "Be brief."}
WHERE_THERE = (user("Where?"), answer("There."))
NOW_HERE = (user("Now?"), answer("Here."))
OSLO = (user("Oslo?"), answer("", calls=[call("Oslo")]), result("rain"))
RAINS = answer("It rains.")
TWO_CALLS = (
    user("Both?"),
    answer("", calls=[call("Oslo"), call("Rome", "abcdefgh2")]),
    result("rain"),
    result("sun", "abcdefgh2"),
)
SUMS = (user("2+2?"), answer("4", "add"), user("3+3?"), answer("6", "again"))
INLINE = (
    user("2+2?"),
    answer("<think>\nadd\n</think>\n\n4"),
    user("3+3?"),
    answer("<think>\nagain\n</think>\n\n6"),
)
THREE = (*WHERE_THERE, *NOW_HERE, user("Then?"), answer("Gone."))

KINDS = {
    "single": conversation(*WHERE_THERE),
    "multi": conversation(*WHERE_THERE, *NOW_HERE),
    "system": conversation(BRIEF, *WHERE_THERE),
    "system multi": conversation(BRIEF, *WHERE_THERE, *NOW_HERE),
    "call": conversation(*OSLO, RAINS, tools=True),
    "call without schema": conversation(*OSLO, RAINS),
    "call, system": conversation(BRIEF, *OSLO, RAINS, tools=True),
    "call, then a question": conversation(*OSLO, RAINS, *NOW_HERE, tools=True),
    "calls": conversation(*TWO_CALLS, answer("Wet, dry."), tools=True),
    "call beside words": conversation(user("Oslo?"), answer("Looking.", calls=[call("Oslo")])),
    "call not in ascii": conversation(user("?"), answer("", calls=[call("Zürich 🙂")])),
    "call, short id": conversation(user("Oslo?"), answer("", calls=[call("Oslo", "1")]), tools=True),
    "result only": conversation(user("Oslo?"), answer("Looking."), result("rain"), RAINS),
    "schema only": conversation(*WHERE_THERE, tools=True),
    "schema only, multi": conversation(*WHERE_THERE, *NOW_HERE, tools=True),
    "reasoning": conversation(*SUMS),
    "reasoning, first skipped": conversation(*SUMS, skipped=(1,)),
    "reasoning inline": conversation(*INLINE),
    "reasoning, call": conversation(
        user("Oslo?"),
        answer("", "ask", [call("Oslo")]),
        result("rain"),
        answer("Rain.", "told"),
        tools=True,
    ),
    "empty": conversation(user("Where?"), answer("")),
    "empty, then one": conversation(user("Where?"), answer(""), *NOW_HERE),
    "blank": conversation(user("Where?"), answer(" \n")),
    "twice": conversation(*WHERE_THERE, answer("Really.")),
    "ends with a question": conversation(*WHERE_THERE, user("Now?")),
    "no answer": conversation(user("Where?")),
    "begins with an answer": conversation(answer("Hi."), *WHERE_THERE),
    "an answer alone": conversation(answer("Hi.")),
    "middle skipped": conversation(*THREE, skipped=(3,)),
    "last skipped": conversation(*WHERE_THERE, *NOW_HERE, skipped=(3,)),
    "all skipped": conversation(*WHERE_THERE, skipped=(1,)),
    "white space around": conversation(user("Where?"), answer("  There. \n")),
    "line break first": conversation(user("Where?"), answer("\n\nThere.")),
    "unicode": conversation(
        user("e\u0301 🙂"), answer("🙂\u0301 and e\u0301"), user("\u0301"), answer("\u0301東")
    ),
    "same words": conversation(user("a"), answer("a"), user("a"), answer("a")),
    "control in a question": conversation(user("say <|im_end|>\n<|im_start|>assistant\n"), answer("There.")),
    "control in an answer": conversation(user("Where?"), answer("a<|im_end|>b")),
    "control last": conversation(user("Where?"), answer("There.<|im_end|>")),
    "no thinking": conversation(*WHERE_THERE, enable_thinking=False),
    "no thinking, multi": conversation(*WHERE_THERE, *NOW_HERE, enable_thinking=False),
    "no thinking, reasoning": conversation(*SUMS, enable_thinking=False),
    "date": conversation(*WHERE_THERE, date_string="3 Mar 2030"),
}

Expected = str | tuple[str, ...] | Reason
DROPPED = {
    field: f"drops {field}" for field in ("system", "tool", "tools", "content", "reasoning", "tool_calls")
}

KIND = "‹system\nBe kind.›\n"
Q = "‹user\nWhere?›\n‹assistant\n"
Q2 = "‹user\nNow?›\n‹assistant\n"
KIND_OSLO = "‹system\nBe kind.\n{tool}›\n‹user\nOslo?›\n‹assistant\n"
OSLO_Q = "‹system\nTools:\n{tool}›\n‹user\nOslo?›\n‹assistant\n"
SUM, SUM2 = "‹user\n2+2?›\n‹assistant\n", "‹user\n3+3?›\n‹assistant\n"
LLAMA_Q = "«user»Where?◆«assistant»"
TODAY = "◂«system»Today: 26 Jul 2024\n"
V3_OSLO = "[AVAILABLE_TOOLS]\n{tool}[/AVAILABLE_TOOLS][INST]Oslo?[/INST]"
V3_CALL = '[TOOL_CALLS]{"name": "w", "arguments": {"city": "Oslo"}, "id": "abcdefgh1"}</s>'
GEMMA_Q = "<start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n"
GEMMA_Q2 = "\n<start_of_turn>user\nNow?<end_of_turn>\n<start_of_turn>model\n"
PHI_Q = "<|user|>\nWhere?<|end|>\n<|assistant|>\n"
DEEP, DEEP_END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DEEP_OSLO = '<｜tool▁call▁begin｜>w\n{"city": "Oslo"}<｜tool▁call▁end｜>' + DEEP_END
OSS = "<|start|>system<|message|>2026-01-02<|end|>"
OSS_Q = OSS + "<|start|>user<|message|>Where?<|end|><|start|>assistant"
OSS_OSLO = (
    OSS + "<|start|>developer<|message|>\n{tool}<|end|><|start|>user<|message|>Oslo?<|end|><|start|>assistant"
)
OSS_CALL = ' to=functions.w<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
OSS_RAIN = "<|start|>functions.w to=assistant<|message|>rain<|end|><|start|>assistant"
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
GLM = "[gMASK]<sop><|user|>\nWhere?<|assistant|>"
GLM_CALL = "<tool_call>w\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call><|observation|>"
ROLE, END_ROLE, GRANITE_END = "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"
GRANITE_Q = f"{ROLE}user{END_ROLE}Where?{GRANITE_END}\n{ROLE}assistant{END_ROLE}"
XML = "<tool_call><function=w><parameter=city>Oslo</tool_call>"

# A default system text; earlier answers are kept; the field with the reasoning is unknown.
QWEN2_5_ROWS: dict[str, Expected] = {
    "single": KIND + Q + "⟦There.›⟧",
    "multi": KIND + Q + "⟦There.›⟧\n" + Q2 + "⟦Here.›⟧",
    "system": "‹system\nBe brief.›\n" + Q + "⟦There.›⟧",
    "call": KIND_OSLO + "⟦{oslo}›⟧\n{rain}⟦It rains.›⟧",
    "calls": "‹system\nBe kind.\n{tool}›\n‹user\nBoth?›\n‹assistant\n⟦{oslo}\n{rome}›⟧\n‹user\n<tool_response>rain"
    "</tool_response>\n<tool_response>sun</tool_response>›\n‹assistant\n⟦Wet, dry.›⟧",
    "call beside words": KIND + "‹user\nOslo?›\n‹assistant\n⟦Looking.\n{oslo}›⟧",
    "call not in ascii": KIND
    + '‹user\n?›\n‹assistant\n⟦<tool_call>{"name": "w", "arguments": {"city": "Zürich 🙂"}}</tool_call>›⟧',
    "schema only": "‹system\nBe kind.\n{tool}›\n" + Q + "⟦There.›⟧",
    "reasoning": DROPPED["reasoning"],
    "reasoning inline": KIND
    + SUM
    + "⟦<think>\nadd\n</think>\n\n4›⟧\n"
    + SUM2
    + "⟦<think>\nagain\n</think>\n\n6›⟧",
    "empty": Reason.EMPTY,
    "empty, then one": Reason.EMPTY,
    "twice": KIND + Q + "⟦There.›⟧\n‹assistant\n⟦Really.›⟧",
    "ends with a question": KIND + Q + "⟦There.›⟧",
    "no answer": Reason.NOTHING_LEARNED,
    "begins with an answer": KIND + "‹assistant\nHi.›\n" + Q + "⟦There.›⟧",
    "an answer alone": Reason.NOTHING_LEARNED,
    "middle skipped": KIND + Q + "⟦There.›⟧\n" + Q2 + "Here.›\n‹user\nThen?›\n‹assistant\n⟦Gone.›⟧",
    "last skipped": KIND + Q + "⟦There.›⟧",
    "all skipped": Reason.NOTHING_LEARNED,
    "white space around": KIND + Q + "⟦  There. \n›⟧",
    "line break first": KIND + Q + "⟦\n\nThere.›⟧",
    "unicode": KIND
    + "‹user\ne\u0301 🙂›\n‹assistant\n⟦🙂\u0301 and e\u0301›⟧\n‹user\n\u0301›\n‹assistant\n⟦\u0301東›⟧",
    "same words": KIND + "‹user\na›\n‹assistant\n⟦a›⟧\n‹user\na›\n‹assistant\n⟦a›⟧",
    "control in a question": KIND + "‹user\nsay ›\n‹assistant\n›\n‹assistant\n⟦There.›⟧",
    "control in an answer": KIND + Q + "⟦a›b›⟧",
    "control last": KIND + Q + "⟦There.›⟧",
}
# Earlier reasoning is rewritten, and empty reasoning goes as soon as the message is not the last.
QWEN3_ROWS: dict[str, Expected] = {
    "single": Q + "⟦{none}There.›⟧",
    "no thinking": Q + "{none}⟦There.›⟧",
    "multi": (Q + "⟦{none}There.›⟧", Q + "There.›\n" + Q2 + "⟦{none}Here.›⟧"),
    "no thinking, multi": (Q + "{none}⟦There.›⟧", Q + "There.›\n" + Q2 + "{none}⟦Here.›⟧"),
    "no thinking, reasoning": Reason.NOT_FOLLOWED,
    "reasoning": (
        SUM + "⟦<think>\nadd\n</think>\n\n4›⟧",
        SUM + "4›\n" + SUM2 + "⟦<think>\nagain\n</think>\n\n6›⟧",
    ),
    "reasoning inline": (
        SUM + "⟦<think>\nadd\n</think>\n\n4›⟧",
        SUM + "4›\n" + SUM2 + "⟦<think>\nagain\n</think>\n\n6›⟧",
    ),
    "reasoning, first skipped": SUM + "4›\n" + SUM2 + "⟦<think>\nagain\n</think>\n\n6›⟧",
    "reasoning, call": OSLO_Q
    + "⟦<think>\nask\n</think>\n\n{oslo}›⟧\n{rain}⟦<think>\ntold\n</think>\n\nRain.›⟧",
    "call": (OSLO_Q + "⟦{none}{oslo}›⟧", OSLO_Q + "{oslo}›\n{rain}⟦{none}It rains.›⟧"),
    # The first one is the last message of the second one's prompt, and keeps its reasoning there.
    "twice": Q + "⟦{none}There.›⟧\n‹assistant\n⟦{none}Really.›⟧",
    "middle skipped": (
        Q + "⟦{none}There.›⟧",
        Q + "There.›\n" + Q2 + "Here.›\n‹user\nThen?›\n‹assistant\n⟦{none}Gone.›⟧",
    ),
    "ends with a question": Q + "⟦{none}There.›⟧",
    "begins with an answer": "‹assistant\nHi.›\n" + Q + "⟦{none}There.›⟧",
    "empty": Reason.EMPTY,
}
ROWS: dict[str, dict[str, Expected]] = {
    "qwen2.5": QWEN2_5_ROWS,
    "qwen3": QWEN3_ROWS,
    # The prompt opens the reasoning.
    "qwen3-thinking": {
        "single": Q + "<think>\n⟦\n</think>\n\nThere.›⟧",
        "multi": (
            Q + "<think>\n⟦\n</think>\n\nThere.›⟧",
            Q + "There.›\n" + Q2 + "<think>\n⟦\n</think>\n\nHere.›⟧",
        ),
        "reasoning": (
            SUM + "<think>\n⟦add\n</think>\n\n4›⟧",
            SUM + "4›\n" + SUM2 + "<think>\n⟦again\n</think>\n\n6›⟧",
        ),
    },
    # Inside a loop of tools nothing is rewritten, not even empty reasoning.
    "qwen3.5": {
        "multi": (
            Q + "<think>\n⟦\n</think>\n\nThere.›⟧",
            Q + "There.›\n" + Q2 + "<think>\n⟦\n</think>\n\nHere.›⟧",
        ),
        "no thinking, multi": (Q + "{none}⟦There.›⟧", Q + "There.›\n" + Q2 + "{none}⟦Here.›⟧"),
        "call": OSLO_Q + f"<think>\n⟦\n</think>\n\n{XML}›⟧\n" + "{rain}<think>\n⟦\n</think>\n\nIt rains.›⟧",
        "reasoning, call": OSLO_Q
        + f"<think>\n⟦ask\n</think>\n\n{XML}›⟧\n"
        + "{rain}<think>\n⟦told\n</think>\n\nRain.›⟧",
        "call, then a question": (
            OSLO_Q + f"<think>\n⟦\n</think>\n\n{XML}›⟧\n" + "{rain}<think>\n⟦\n</think>\n\nIt rains.›⟧",
            OSLO_Q + XML + "›\n{rain}It rains.›\n" + Q2 + "<think>\n⟦\n</think>\n\nHere.›⟧",
        ),
    },
    "qwq": {
        "single": Reason.NOT_FOLLOWED,
        "reasoning inline": (
            SUM + "<think>\n⟦add\n</think>\n\n4›⟧",
            SUM + "4›\n" + SUM2 + "<think>\n⟦again\n</think>\n\n6›⟧",
        ),
    },
    # The tokenizer's end token differs from the turn's; texts are trimmed.
    "llama3": {
        "single": "◂" + LLAMA_Q + "⟦There.◆⟧",
        "multi": "◂" + LLAMA_Q + "⟦There.◆⟧«user»Now?◆«assistant»⟦Here.◆⟧",
        "system": "◂«system»Be brief.◆" + LLAMA_Q + "⟦There.◆⟧",
        "white space around": "◂" + LLAMA_Q + "⟦There.◆⟧",
        "unicode": "◂«user»e\u0301 🙂◆«assistant»⟦🙂\u0301 and e\u0301◆⟧«user»\u0301◆«assistant»⟦\u0301東◆⟧",
        "blank": Reason.EMPTY,
        "schema only": DROPPED["tools"],
        "call beside words": DROPPED["tool_calls"],
        "call without schema": DROPPED["tool_calls"],
        "twice": "◂" + LLAMA_Q + "⟦There.◆⟧«assistant»⟦Really.◆⟧",
    },
    "llama3.1": {
        "single": TODAY + "◆" + LLAMA_Q + "⟦There.◆⟧",
        "date": "◂«system»Today: 3 Mar 2030\n◆" + LLAMA_Q + "⟦There.◆⟧",
        "system": TODAY + "Be brief.◆" + LLAMA_Q + "⟦There.◆⟧",
        "call": TODAY
        + '◆«user»Tools:\n{tool}\nOslo?◆«assistant»⟦{"name": "w", "parameters": {"city": "Oslo"}}◆⟧'
        + "«ipython»rain◆«assistant»⟦It rains.◆⟧",
        "calls": Reason.RAISED,
        "call beside words": DROPPED["content"],
    },
    "llama3.2": {"single": "◂«system»Today: 02 Jan 2026\n◆" + LLAMA_Q + "⟦There.◆⟧"},
    "mistral-v0.1": {
        "single": "<s>[INST] Where? [/INST]⟦There.</s>⟧",
        "multi": "<s>[INST] Where? [/INST]⟦There.</s>⟧ [INST] Now? [/INST]⟦Here.</s>⟧",
        "ends with a question": "<s>[INST] Where? [/INST]⟦There.</s>⟧",
        "system": Reason.RAISED,
        "twice": Reason.RAISED,
        "begins with an answer": Reason.RAISED,
    },
    # Tools move to the last question.
    "mistral-v0.3": {
        "single": "<s>[INST]Where?[/INST]⟦There.</s>⟧",
        "system": DROPPED["system"],
        "call": f"<s>{V3_OSLO}⟦{V3_CALL}⟧[TOOL_RESULTS]rain[/TOOL_RESULTS]⟦It rains.</s>⟧",
        "call beside words": DROPPED["content"],
        "call, short id": Reason.RAISED,
        "schema only, multi": (
            "<s>[AVAILABLE_TOOLS]\n{tool}[/AVAILABLE_TOOLS][INST]Where?[/INST]⟦There.</s>⟧",
            "<s>[INST]Where?[/INST]There.</s>[AVAILABLE_TOOLS]\n{tool}[/AVAILABLE_TOOLS][INST]Now?[/INST]⟦Here.</s>⟧",
        ),
    },
    # The system text is gone from every text that ends with an answer, but not from the prompts.
    "nemo": {
        "multi": "<s>[INST]Where?[/INST]⟦There.</s>⟧[INST]Now?[/INST]⟦Here.</s>⟧",
        "system": "<s>[INST]Be brief.\n\nWhere?[/INST]⟦There.</s>⟧",
        "system multi": (
            "<s>[INST]Be brief.\n\nWhere?[/INST]⟦There.</s>⟧",
            "<s>[INST]Where?[/INST]There.</s>[INST]Be brief.\n\nNow?[/INST]⟦Here.</s>⟧",
        ),
        # After a tool's result, a model no longer sees the system text.
        "call, system": "drops system",
    },
    "gemma2": {
        "single": "<bos>" + GEMMA_Q + "⟦There.<end_of_turn>⟧",
        "multi": "<bos>" + GEMMA_Q + "⟦There.<end_of_turn>⟧" + GEMMA_Q2 + "⟦Here.<end_of_turn>⟧",
        "white space around": "<bos>" + GEMMA_Q + "⟦There.<end_of_turn>⟧",
        "system": Reason.RAISED,
        "twice": Reason.RAISED,
        "call": Reason.RAISED,
    },
    "gemma3": {
        "system multi": "<bos>"
        + GEMMA_Q.replace("Where?", "Be brief.\n\nWhere?")
        + "⟦There.<end_of_turn>⟧"
        + GEMMA_Q2
        + "⟦Here.<end_of_turn>⟧",
    },
    # After the last answer stands a second end token, which is not learned.
    "phi3": {
        "single": PHI_Q + "⟦There.<|end|>⟧",
        "multi": PHI_Q + "⟦There.<|end|>⟧\n<|user|>\nNow?<|end|>\n<|assistant|>\n⟦Here.<|end|>⟧",
        "system": "<|system|>\nBe brief.<|end|>\n" + PHI_Q + "⟦There.<|end|>⟧",
        "result only": DROPPED["tool"],
        "schema only": DROPPED["tools"],
        "call beside words": DROPPED["tool_calls"],
    },
    "phi4": {
        "multi": "‹user<|im_sep|>Where?›‹assistant<|im_sep|>⟦There.›⟧‹user<|im_sep|>Now?›‹assistant<|im_sep|>⟦Here.›⟧",
        "result only": DROPPED["tool"],
    },
    "phi4-first": {
        "multi": "‹user<|im_sep|>Where?›‹assistant<|im_sep|>⟦There.›⟧‹user<|im_sep|>Now?›‹assistant<|im_sep|>⟦Here.›⟧",
        "system": "‹system<|im_sep|>Be brief.›‹user<|im_sep|>Where?›‹assistant<|im_sep|>⟦There.›⟧",
    },
    # Arguments are a text; a schema is not written; reasoning is cut off even from the last answer.
    "deepseek": {
        "single": DEEP + f"<｜User｜>Where?<｜Assistant｜>⟦There.{DEEP_END}⟧",
        "system": DEEP + f"Be brief.<｜User｜>Where?<｜Assistant｜>⟦There.{DEEP_END}⟧",
        "call without schema": DEEP
        + f"<｜User｜>Oslo?<｜Assistant｜>⟦{DEEP_OSLO}⟧<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>"
        + f"⟦It rains.{DEEP_END}⟧",
        "call not in ascii": DEEP + f"<｜User｜>?<｜Assistant｜>⟦{DEEP_OSLO}⟧".replace("Oslo", "Zürich 🙂"),
        "call": DROPPED["tools"],
        "reasoning": DROPPED["reasoning"],
        "reasoning inline": DROPPED["reasoning"],
    },
    "r1-distill": {"single": Reason.NOT_FOLLOWED, "reasoning inline": Reason.NOT_FOLLOWED},
    "smollm2": {
        "multi": "‹system\nI am small.›\n" + Q + "⟦There.›⟧\n" + Q2 + "⟦Here.›⟧",
        "system": "‹system\nBe brief.›\n" + Q + "⟦There.›⟧",
        "call beside words": DROPPED["tool_calls"],
        "schema only": DROPPED["tools"],
    },
    # Its marks enclose the header and the line break after the end.
    "smollm3": {
        "multi": "‹system\nDate: 02 January 2026›\n" + Q + "⟦There.›⟧\n" + Q2 + "⟦Here.›⟧",
        "system": "‹system\nDate: 02 January 2026\nBe brief.›\n" + Q + "⟦There.›⟧",
        "schema only": "‹system\nDate: 02 January 2026\n{tool}›\n" + Q + "⟦There.›⟧",
        "twice": "‹system\nDate: 02 January 2026›\n" + Q + "⟦There.›⟧\n‹assistant\n⟦Really.›⟧",
        "call beside words": DROPPED["tool_calls"],
    },
    # <|return|> becomes <|end|> in a history; a call's analysis is in its prompt, but not in the text with the answer.
    "gpt-oss": {
        "single": f"{OSS_Q}⟦{FINAL}There.<|return|>⟧",
        "multi": (
            f"{OSS_Q}⟦{FINAL}There.<|return|>⟧",
            f"{OSS_Q}{FINAL}There.<|end|><|start|>user<|message|>Now?<|end|><|start|>assistant⟦{FINAL}Here.<|return|>⟧",
        ),
        "reasoning": (
            f"{OSS_Q}⟦{ANALYSIS}add<|end|><|start|>assistant{FINAL}4<|return|>⟧".replace("Where?", "2+2?"),
            f"{OSS_Q}{FINAL}4<|end|><|start|>user<|message|>3+3?<|end|><|start|>assistant".replace(
                "Where?", "2+2?"
            )
            + f"⟦{ANALYSIS}again<|end|><|start|>assistant{FINAL}6<|return|>⟧",
        ),
        "call": f"{OSS_OSLO}⟦{OSS_CALL}⟧{OSS_RAIN}⟦{FINAL}It rains.<|return|>⟧",
        "reasoning, call": f"{OSS_OSLO}⟦{ANALYSIS}ask<|end|><|start|>assistant{OSS_CALL}⟧{OSS_RAIN}"
        + f"⟦{ANALYSIS}told<|end|><|start|>assistant{FINAL}Rain.<|return|>⟧",
        "calls": DROPPED["tool_calls"],
        "call beside words": DROPPED["content"],
    },
    # Nothing ends an answer: the marker of the next role is appended and learned.
    "glm": {
        "single": GLM + "⟦\n<think></think>\nThere.<|user|>⟧",
        "no thinking": GLM + "\n<think></think>⟦\nThere.<|user|>⟧",
        "multi": GLM
        + "⟦\n<think></think>\nThere.<|user|>⟧\nNow?<|assistant|>⟦\n<think></think>\nHere.<|user|>⟧",
        "ends with a question": GLM + "⟦\n<think></think>\nThere.<|user|>⟧",
        "reasoning": (
            "[gMASK]<sop><|user|>\n2+2?<|assistant|>⟦\n<think>add</think>\n4<|user|>⟧",
            "[gMASK]<sop><|user|>\n2+2?<|assistant|>\n<think></think>\n4<|user|>\n3+3?<|assistant|>"
            "⟦\n<think>again</think>\n6<|user|>⟧",
        ),
        "call": "[gMASK]<sop><|system|>\nTools:\n{tool}<|user|>\nOslo?<|assistant|>⟦\n<think></think>\n"
        + GLM_CALL
        + "⟧\n<r>rain</r><|assistant|>⟦\n<think></think>\nIt rains.<|user|>⟧",
        "call beside words": "[gMASK]<sop><|user|>\nOslo?<|assistant|>⟦\n<think></think>\nLooking.\n"
        + GLM_CALL
        + "⟧",
        "twice": (
            GLM + "⟦\n<think></think>\nThere.<|user|>⟧",
            GLM + "\n<think></think>\nThere.<|assistant|>⟦\n<think></think>\nReally.<|user|>⟧",
        ),
    },
    # The token that begins a text also ends an answer.
    "olmo2": {
        "multi": "<|endoftext|><|user|>\nWhere?\n<|assistant|>\n⟦There.<|endoftext|>⟧\n"
        "<|user|>\nNow?\n<|assistant|>\n⟦Here.<|endoftext|>⟧",
        "system": "<|endoftext|><|system|>\nBe brief.\n<|user|>\nWhere?\n<|assistant|>\n⟦There.<|endoftext|>⟧",
        "call beside words": DROPPED["tool_calls"],
    },
    # Two tokens end a turn; generation stops at the second.
    "cohere2": {
        "multi": "<|USER|>Where?<|END_OF_TURN|><|BOT|>⟦There.<|END_RESPONSE|><|END_OF_TURN|>⟧"
        "<|USER|>Now?<|END_OF_TURN|><|BOT|>⟦Here.<|END_RESPONSE|><|END_OF_TURN|>⟧",
    },
    "granite": {
        "single": f"{ROLE}system{END_ROLE}January 02, 2026{GRANITE_END}\n{GRANITE_Q}⟦There.{GRANITE_END}⟧",
        "system": f"{ROLE}system{END_ROLE}Be brief.{GRANITE_END}\n{GRANITE_Q}⟦There.{GRANITE_END}⟧",
        "call beside words": DROPPED["tool_calls"],
    },
}


def written_out(text: str) -> str:
    for short, long in SHORT.items():
        text = text.replace(short, long)
    for short in "‹›":  # {rain} holds them
        text = text.replace(short, SHORT[short])
    return text


def outcome(
    template: ChatTemplate, chat: Conversation, turns: Turns = "all", allowed: frozenset[str] = frozenset()
) -> Expected:
    """Return the samples with ⟦ ⟧ around what is learned, a single one as a text; or why there are none."""
    settings = ChatSettings(turns=turns, allowed=allowed)
    try:
        samples = ChatSampler(template, settings).samples(chat, WHERE, Counter())
    except Refusal as refusal:
        if refusal.reason is Reason.DROPPED:
            (field,) = re.findall(r"\((\w+)\): the chat template does not write it$", refusal.detail)
            return f"drops {field}"
        return refusal.reason
    shown = []
    for sample in samples:
        text, done = "", 0
        for start, end in sample.learned:
            text += sample.text[done:start] + "⟦" + sample.text[start:end] + "⟧"
            done = end
        shown.append(text + sample.text[done:])
    return shown[0] if len(shown) == 1 else tuple(shown)


def expected(row: Expected) -> Expected:
    if isinstance(row, str):
        return written_out(row)
    return tuple(map(written_out, row)) if isinstance(row, tuple) else row
