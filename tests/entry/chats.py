"""Conversations for four behaviours of chat templates, and the parts that a model learns, written by hand.

A sample is what the model sees at inference; between ⟦ and ⟧ stands what it has to say itself, with the token at which
it stops. It was worked out from the template and from that sentence, never from the output of the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
# Short forms of texts that would fill the lines.
SHORT = {
    "‹": "<|im_start|>",
    "›": "<|im_end|>",
    "«": "<|start_header_id|>",
    "»": "<|end_header_id|>\n\n",
    "◂": "<|begin_of_text|>",
    "◆": "<|eot_id|>",
    "{none}": "<think></think>\n",
    "{tool}": '{"type": "function", "function": {"name": "w", "description": "weather", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}',
    "{river}": '<tool_call>{"name": "w", "arguments": {"city": "river"}}</tool_call>',
    "{house}": '<tool_call>{"name": "w", "arguments": {"city": "house"}}</tool_call>',
}
TOOL = {
    "type": "function",
    "function": {
        "name": "w",
        "description": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class Chat:
    """One line of the data.

    Attributes:
        samples: texts with marks, by the number of messages after which they end.
    """

    row: dict[str, Any]
    samples: dict[int, str]


def written_out(text: str) -> str:
    for short, long in SHORT.items():
        text = text.replace(short, long)
    return text


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def calling(*cities: str) -> Message:
    calls = [{"type": "function", "function": {"name": "w", "arguments": {"city": city}}} for city in cities]
    return answer("", tool_calls=calls)


def chat(*messages: Message, samples: dict[int, str], tools: bool = False) -> Chat:
    row = {"messages": list(messages)} | ({"tools": [TOOL]} if tools else {})
    return Chat(row, {count: written_out(text) for count, text in samples.items()})


def result(text: str) -> Message:
    return {"role": "tool", "name": "w", "content": text}


KIND = "‹system\nBe kind.\n{tool}›\n"
# Earlier answers are kept, so that one sample has all of them.
KEEPS = [
    chat(
        user("Where is the house?"),
        answer("Near the river."),
        user("And the children?"),
        answer("They sing until night comes."),
        samples={
            4: "◂«user»Where is the house?◆«assistant»⟦Near the river.◆⟧"
            "«user»And the children?◆«assistant»⟦They sing until night comes.◆⟧"
        },
    ),
    chat(
        {"role": "system", "content": "Be brief."},
        user("Who stands there?"),
        answer("Many."),
        samples={3: "◂«system»Be brief.◆«user»Who stands there?◆«assistant»⟦Many.◆⟧"},
    ),
    chat(user("Sing"), answer(" a small "), samples={2: "◂«user»Sing◆«assistant»⟦a small◆⟧"}),
    # The last message is a question: none of its tokens is learned, and none of the header before it.
    chat(
        user("a"),
        answer("a"),
        user("a"),
        answer("river"),
        user("Play?"),
        samples={4: "◂«user»a◆«assistant»⟦a◆⟧«user»a◆«assistant»⟦river◆⟧"},
    ),
]
# Reasoning is dropped when a later question follows, so that each answer has a sample of its own.
REWRITES = [
    chat(
        user("Where?"),
        answer("Near.", reasoning_content="the river"),
        user("Who?"),
        answer("Many children.", reasoning_content="they play and sing"),
        user("When?"),
        answer("Night.", reasoning_content="it comes"),
        samples={
            2: "‹user\nWhere?›\n‹assistant\n⟦<think>\nthe river\n</think>\n\nNear.›⟧",
            4: "‹user\nWhere?›\n‹assistant\nNear.›\n"
            "‹user\nWho?›\n‹assistant\n⟦<think>\nthey play and sing\n</think>\n\nMany children.›⟧",
            6: "‹user\nWhere?›\n‹assistant\nNear.›\n‹user\nWho?›\n‹assistant\nMany children.›\n"
            "‹user\nWhen?›\n‹assistant\n⟦<think>\nit comes\n</think>\n\nNight.›⟧",
        },
    ),
    chat(
        user("House?"),
        answer("Small."),
        samples={2: "‹user\nHouse?›\n‹assistant\n⟦<think>\n\n</think>\n\nSmall.›⟧"},
    ),
]
# The marker of the next speaker ends an answer; after the last answer the marker is added.
NO_END = [
    chat(
        user("Where is it?"),
        answer("Near the river."),
        user("And they?"),
        answer("They play."),
        samples={
            4: "[gMASK]<sop><|user|>\nWhere is it?<|assistant|>⟦\n{none}Near the river.<|user|>⟧"
            "\nAnd they?<|assistant|>⟦\n{none}They play.<|user|>⟧"
        },
    ),
    chat(
        user("Sing until night"),
        answer("a"),
        samples={2: "[gMASK]<sop><|user|>\nSing until night<|assistant|>⟦\n{none}a<|user|>⟧"},
    ),
    chat(
        {"role": "system", "content": "Be brief."},
        user("Who?"),
        answer("Many children sing."),
        samples={
            3: "[gMASK]<sop><|system|>\nBe brief.<|user|>\nWho?<|assistant|>⟦\n{none}Many children sing.<|user|>⟧"
        },
    ),
    chat(
        user("Small?"),
        answer("Small.", reasoning_content="the house"),
        samples={2: "[gMASK]<sop><|user|>\nSmall?<|assistant|>⟦\n<think>the house</think>\nSmall.<|user|>⟧"},
    ),
]
TOOLS = [
    chat(
        user("River?"),
        calling("river"),
        result("rain and night"),
        answer("It rains."),
        tools=True,
        samples={
            4: KIND + "‹user\nRiver?›\n‹assistant\n⟦{river}›⟧\n"
            "‹user\n<tool_response>rain and night</tool_response>›\n‹assistant\n⟦It rains.›⟧"
        },
    ),
    chat(
        user("Both?"),
        calling("river", "house"),
        result("rain"),
        result("sun"),
        answer("Near the river.", weight=0),
        user("And now?"),
        answer("The children play.", weight=1),
        tools=True,
        samples={
            7: KIND + "‹user\nBoth?›\n‹assistant\n⟦{river}\n{house}›⟧\n"
            "‹user\n<tool_response>rain</tool_response>\n<tool_response>sun</tool_response>›\n"
            "‹assistant\nNear the river.›\n‹user\nAnd now?›\n‹assistant\n⟦The children play.›⟧"
        },
    ),
    chat(
        user("Who?"),
        answer("Children.", weight=0),
        user("Which?"),
        answer("Many small children."),
        samples={
            4: "‹system\nBe kind.›\n‹user\nWho?›\n‹assistant\nChildren.›\n"
            "‹user\nWhich?›\n‹assistant\n⟦Many small children.›⟧"
        },
    ),
    chat(
        user("Sing?"),
        answer("Until night."),
        user("Why?"),
        answer("They play.", weight=0),
        samples={2: "‹system\nBe kind.›\n‹user\nSing?›\n‹assistant\n⟦Until night.›⟧"},
    ),
]
# For each behaviour its template and its data, which give four samples.
BEHAVIOURS = {
    "keeps": ("llama3", KEEPS),
    "rewrites": ("qwen3", REWRITES),
    "no-end": ("glm", NO_END),
    "tools": ("qwen2.5", TOOLS),
}
