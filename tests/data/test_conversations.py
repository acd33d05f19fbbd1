"""Every published layout is read as the same conversation, and what cannot be read is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_fdd.data.conversations import (
    Conversation,
    conversation_layouts,
    instruction_conversation,
    is_conversation,
    read_conversation,
)
from megatron_fdd.data.instructions import find_layout, read_pair, read_record
from megatron_fdd.data.refusals import Reason, Refusal

ASKED = {"role": "user", "content": "Where is the river?"}
ANSWER = {"role": "assistant", "content": "Near the house."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "river"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3 km"}
BARE_TOOL = {"name": "find", "parameters": {"type": "object", "properties": {"what": {"enum": [None]}}}}
TOOL = {"type": "function", "function": BARE_TOOL}


def read(fields: dict[str, Any], **more: Any) -> Conversation:
    found = read_conversation(json.loads(json.dumps(fields)), "x.jsonl, line 7", **more)
    assert found is not None
    return found


def say(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


# The fields of a record, the messages read from it, and which of them are learned.
LAYOUTS: dict[str, tuple[dict[str, Any], list[Any], list[int]]] = {
    "openai": ({"messages": [SYSTEM, ASKED, ANSWER]}, [SYSTEM, ASKED, ANSWER], [2]),
    "openai as text": ({"messages": json.dumps([ASKED, ANSWER])}, [ASKED, ANSWER], [1]),
    "sharegpt": (
        {"conversations": [say("human", ASKED["content"]), say("gpt", ANSWER["content"])], "system": "Be brief."},
        [SYSTEM, ASKED, ANSWER],
        [2],
    ),
    "sharegpt as text": (
        {"conversation": json.dumps([say("Human", ASKED["content"]), say("bot", ANSWER["content"])])},
        [ASKED, ANSWER],
        [1],
    ),
    "sharegpt, calls": (
        {
            "conversations": [
                say("user", ASKED["content"]),
                say("function_call", json.dumps({"name": "find", "arguments": {"what": "river"}})),
                say("observation", "3 km"),
                say("chatgpt", ANSWER["content"]),
            ]
        },
        [ASKED, CALLING, RESULT, ANSWER],
        [1, 3],
    ),
    "names of openai in sharegpt": ({"conversations": [ASKED, ANSWER]}, [ASKED, ANSWER], [1]),
    "prompt and completion": (
        {"prompt": [ASKED, ANSWER, ASKED], "completion": [ANSWER]},
        [ASKED, ANSWER, ASKED, ANSWER],
        [3],
    ),
    "xlam": (
        {
            "query": ASKED["content"],
            "tools": json.dumps([BARE_TOOL]),
            "answers": json.dumps([{"name": "find", "arguments": {"what": "river"}}]),
        },
        [ASKED, CALLING],
        [1],
    ),
    "begins with the assistant": ({"messages": [ANSWER, ASKED, ANSWER]}, [ANSWER, ASKED, ANSWER], [2]),
    "no assistant": ({"messages": [ASKED]}, [ASKED], []),
    "same system twice": ({"messages": [SYSTEM, ASKED], "system": "Be brief."}, [SYSTEM, ASKED], []),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    fields, messages, learned = LAYOUTS[name]
    found = read(fields)
    assert list(found.messages) == messages
    assert [number for number, is_learned in enumerate(found.is_learned) if is_learned] == learned
    assert (found.template_kwargs, found.unknown_fields) == ({}, ())
    assert is_conversation(fields)


@pytest.mark.parametrize(
    ("fields", "messages", "learned"),
    [
        ({"prompt": [ASKED, ANSWER, ASKED], "chosen": [ANSWER]}, [ASKED, ANSWER, ASKED, ANSWER], [3]),
        ({"prompt": ASKED["content"], "chosen": [ANSWER]}, [ASKED, ANSWER], [1]),
        ({"chosen": [ASKED, ANSWER, ASKED, ANSWER]}, [ASKED, ANSWER, ASKED, ANSWER], [3]),
        # The whole conversation beside its first question, and beside the conversation that was judged.
        ({"prompt": ASKED["content"], "chosen": [ASKED, ANSWER], "messages": [ASKED]}, [ASKED, ANSWER], [1]),
    ],
)
def test_the_chosen_answer_is_read_when_asked_for(fields: Any, messages: Any, learned: list[int]) -> None:
    fields["rejected"] = [ANSWER]
    found = read(fields, response_key="chosen")
    assert list(found.messages) == messages
    assert [number for number, is_learned in enumerate(found.is_learned) if is_learned] == learned
    assert found.unknown_fields == ()
    assert is_conversation(fields) == ("messages" in fields)


@pytest.mark.parametrize(
    "fields",
    [{}, {"text": "x"}, {"prompt": "x", "completion": "y"}, {"conversation": "A: x"}, {"messages": None}],
)
def test_other_records_are_no_conversations(fields: dict[str, Any]) -> None:
    assert read_conversation(fields, "x") is None
    assert not is_conversation(fields)


@pytest.mark.parametrize("name", ["weight", "loss", "train", "training", "trainable"])
@pytest.mark.parametrize(
    ("flag", "is_learned"), [(0, False), (False, False), (1, True), (1.0, True), (None, True)]
)
def test_messages_can_be_context(name: str, flag: Any, is_learned: bool) -> None:
    assert read({"messages": [ASKED, {**ANSWER, name: flag}]}).is_learned == (False, is_learned)


# A message after a question, and what it becomes.
MESSAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "null": ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
    "parts": (
        {"role": "model", "content": [{"type": "text", "text": "Near "}, {"text": "it."}]},
        {"role": "assistant", "content": "Near it."},
    ),
    "thinking part": (
        {"role": "assistant", "content": [{"type": "thinking", "thinking": [{"text": "Hm."}]}, {"text": "x"}]},
        {"role": "assistant", "content": "x", "reasoning_content": "Hm."},
    ),
    **{
        key: ({**ANSWER, key: "Hm."}, {**ANSWER, "reasoning_content": "Hm."})
        for key in ("reasoning", "thinking", "reasoning_content")
    },
    "both names": ({**ANSWER, "reasoning": "Hm.", "reasoning_content": "Hm."}, {**ANSWER, "reasoning_content": "Hm."}),
    "reasoning alone": (
        {"role": "assistant", "thinking": "Hm."},
        {"role": "assistant", "content": "", "reasoning_content": "Hm."},
    ),
    "no reasoning": ({**ANSWER, "reasoning": ""}, ANSWER),
    "arguments as text": (
        {"role": "assistant", "tool_calls": [{"id": "a1", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}, "id": "a1"}],
        },
    ),
    "old call": (
        {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": '{"what": "river"}'}},
        CALLING,
    ),
    "bare call": (
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": None}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
        },
    ),
    "old result": (
        {"role": "function", "name": "find", "content": "3 km"},
        {"role": "tool", "content": "3 km", "name": "find"},
    ),
    "result": ({**RESULT, "tool_call_id": "a1", "id": 7, "name": None}, {**RESULT, "tool_call_id": "a1"}),
    "no calls": ({**ANSWER, "tool_calls": []}, ANSWER),
    "a pair of surrogates": ({"role": "user", "content": "\N{GRINNING FACE}"}, {"role": "user", "content": "😀"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_normalised(name: str) -> None:
    given, expected = MESSAGES[name]
    found = read({"messages": [ASKED, given]})
    assert found.messages[1] == expected
    assert found.unknown_fields == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"tools": [BARE_TOOL]},
        {"tools": [{"function": BARE_TOOL}]},
        {"tools": [{"type": "function", **BARE_TOOL}]},
        {"tools": json.dumps([BARE_TOOL])},
        {"tools": json.dumps(BARE_TOOL)},
        {"functions": [BARE_TOOL], "tools": []},
    ],
)
def test_tools(fields: dict[str, Any]) -> None:
    assert read({"messages": [ASKED, ANSWER], **fields}).tools == (TOOL,)


@pytest.mark.parametrize("empty", [None, [], "", "[]"])
def test_no_tools(empty: Any) -> None:
    assert read({"messages": [ASKED, ANSWER], "tools": empty}).tools is None


@pytest.mark.parametrize(
    ("fields", "kwargs"),
    [
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": True, "x": 1}}, {"enable_thinking": True, "x": 1}),
        (
            {"chat_template_kwargs": '{"x": 1}', "documents": [{"text": "a"}]},
            {"x": 1, "documents": [{"text": "a"}]},
        ),
        ({"chat_template_kwargs": None, "documents": None}, {}),
    ],
)
def test_a_record_sets_the_template(fields: dict[str, Any], kwargs: dict[str, Any]) -> None:
    found = read({"messages": [ASKED, ANSWER], **fields})
    assert (found.template_kwargs, found.unknown_fields) == (kwargs, ())


def test_what_nobody_reads_is_named() -> None:
    messages = [{**ASKED, "train": True}, {**ANSWER, "mood": "good", "id": 1}]
    fields = {"messages": messages, "id": 3, "source": "a", "persona": "b", "empty": None}
    assert read(fields).unknown_fields == (
        "messages[].mood",
        "messages[].train (not of the assistant)",
        "persona",
    )


def after(message: object) -> dict[str, Any]:
    return {"messages": [ASKED, message]}


def beside(**fields: Any) -> dict[str, Any]:
    return {"messages": [ASKED, ANSWER], **fields}


def calling(**call: Any) -> dict[str, Any]:
    return after({"role": "assistant", "content": "", "tool_calls": [call]})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "'messages' must be a list with at least one message"),
    ({"messages": "hello"}, "has a text in 'messages' that is not JSON: malformed JSON"),
    ({"messages": '{"role": "user"}'}, "'messages' must be a list"),
    ({"prompt": [ASKED], "completion": []}, "'completion' must be a list with at least one"),
    (after("hello"), "message 2 is a str; it must be an object"),
    (after({"content": "x"}), "message 2 has a NoneType as its role"),
    (after({"role": ["user"], "content": "x"}), "message 2 has a list as its role"),
    (after(say("narrator", "x")), "message 2 has the role 'narrator'; known are assistant, bot"),
    (after({"role": "user", "content": "x", "value": "y"}), "message 2 says one thing in 'content' and another in"),
    (after({"role": "user"}), "message 2 must have a text as its 'content'"),
    (after({"role": "user", "content": 3}), "message 2 must have a text, or a list .*, not a int"),
    (after({"role": "user", "content": ["x"]}), "message 2 must have a text, or a list of"),
    (after({"role": "user", "content": [{"type": "text"}]}), "message 2 has a part .* without a text"),
    (after({"role": "user", "content": "a\ud800"}), r"message 2 has a content that .*pair \(\\ud800, character 2"),
    (after({"role": "user", "content": "a\0"}), r"message 2 has a content that holds a NUL \(character 2\)"),
    (after({**ANSWER, "reasoning": "\udfff"}), r"message 2 has a 'reasoning_content' that holds half .*\\udfff"),
    (after({**ANSWER, "reasoning": ["x"]}), "message 2 has a list as its 'reasoning_content'"),
    (after({**ANSWER, "reasoning": "x", "thinking": "y"}), "one thing in 'reasoning' and another in 'thinking'"),
    (after({**ANSWER, "weight": 0.5}), "message 2 has 'weight' 0.5; a message is learned or not"),
    (after({**ANSWER, "train": "no"}), "message 2 has 'train' 'no'"),
    (after({**ANSWER, "train": True, "loss": False}), "one thing in 'loss' and another in 'train'"),
    (after({**ASKED, "tool_calls": [CALL]}), "message 2 calls a tool as user"),
    (after({**RESULT, "tool_call_id": 3}), "message 2 has a int as its 'tool_call_id'"),
    (after(say("function_call", "find it")), "message 2 has a text in 'tool_calls' that is not JSON"),
    (after(say("function_call", "[]")), "message 2 calls no tool"),
    (calling(name="f", arguments="x"), "message 2 has a text in 'arguments' that is not JSON"),
    (calling(name="f", arguments="[]"), "message 2 has a call of 'f' whose arguments are a list"),
    (calling(name="f", arguments={"x": "\ud800"}), r"message 2 has a call \(number 1\) that holds half"),
    (calling(name="f", arguments={"\ud800": 1}), r"message 2 has a call \(number 1\) that holds half"),
    (calling(name="f", arguments={"x": 1e999}), r"message 2 has a call \(number 1\) that holds a number .* too large"),
    (calling(arguments={}), r"message 2 has a call \(number 1\) without the text 'name'"),
    (calling(type="browser", name="f"), r"message 2 has a call \(number 1\) of the type 'browser'"),
    (after({**CALLING, "tool_calls": ["f"]}), r"message 2 has a call \(number 1\) that is not an object"),
    (beside(tools="find"), "has a text in 'tools' that is not JSON"),
    (beside(tools=[TOOL, {"type": "browser"}]), "'tools' must hold functions with a 'name'; number 2"),
    (beside(tools=[{"name": "f\0"}]), "'tools', number 1, holds a NUL"),
    (beside(tools=[TOOL], functions=[BARE_TOOL]), "has 'tools' and 'functions'"),
    (beside(system=3), "the field 'system' is a int"),
    (beside(system="\ud800"), "has a content that holds half"),
    ({"messages": [SYSTEM, ASKED], "system": "Be long."}, "one system text in 'system' and another"),
    (beside(enable_thinking="yes"), "has a text in 'enable_thinking' that is not JSON"),
    (beside(enable_thinking=1), "'enable_thinking' must be true or false"),
    (beside(enable_thinking=True, chat_template_kwargs={"enable_thinking": False}), "one thing in 'enable_thinking'"),
    (beside(chat_template_kwargs=[1]), "'chat_template_kwargs' must be an object"),
    (beside(chat_template_kwargs={"messages": []}), "must not hold 'messages'"),
    (beside(chat_template_kwargs={"x": "\ud800"}), "holds half of a surrogate"),
    (beside(documents={"text": "x"}), "'documents' must be a list"),
    ({"query": 3, "tools": "[]", "answers": "[]"}, "'answers' must hold at least one call"),
    ({"query": 3, "tools": "[]", "answers": '[{"name": "f"}]'}, "the field 'query' is a int"),
    (beside(tools="[" * 100_000), "is nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=rf"^x.jsonl, line 7: .*{message}") as refusal:
        read_conversation(fields, "x.jsonl, line 7")
    assert refusal.value.reason is Reason.MALFORMED


def test_a_chosen_list_ends_with_the_answer() -> None:
    with pytest.raises(Refusal, match="line 7: 'chosen' must end with the assistant's"):
        read({"chosen": [ASKED]}, response_key="chosen")


@pytest.mark.parametrize(
    "fields",
    [
        beside(images=["a.png"]),
        after({**ASKED, "images": ["a.png"]}),
        after({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}),
    ],
)
def test_images_are_a_reason_of_their_own(fields: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match="line 7: .*image") as refusal:
        read(fields)
    assert refusal.value.reason is Reason.MEDIA


def test_no_images_are_no_reason() -> None:
    assert read(beside(images=[], videos=None)).unknown_fields == ()


def test_layouts_have_names() -> None:
    for name in ("messages", "conversations", "completion", "query", "chosen"):
        assert name in conversation_layouts()


ALPACA = {"instruction": "And at night?", "input": "", "output": "Too."}


def test_alpaca_with_earlier_turns() -> None:
    fields = {**ALPACA, "system": "Be brief.", "history": [["Where is the river?", "Near the house."]]}
    assert find_layout(fields) == "alpaca"
    (instruction,) = read_record("alpaca", fields, "here")
    found = instruction_conversation(instruction, "here")
    now = [{"role": "user", "content": "And at night?"}, {"role": "assistant", "content": "Too."}]
    assert list(found.messages) == [SYSTEM, ASKED, ANSWER, *now]
    assert found.is_learned == (False, False, True, False, True)
    assert instruction.messages() == [SYSTEM, ASKED, ANSWER, now[0]]


@pytest.mark.parametrize("name", ["system", "history"])
@pytest.mark.parametrize("template", ["alpaca", "none"])
def test_other_templates_have_no_place_for_earlier_turns(name: str, template: Any) -> None:
    value = {"system": "Be brief.", "history": '[["a", "b"]]'}[name]
    (instruction,) = read_record("alpaca", {**ALPACA, name: value}, "here")
    with pytest.raises(
        ValueError, match=f"has the field '{name}', for which only a chat template has a place"
    ):
        instruction.prompt(template)
    (instruction,) = (
        read_record("alpaca", {**ALPACA, name: []}, "here")
        if name == "history"
        else (read_record("alpaca", {**ALPACA, name: ""}, "here"))
    )
    assert "And at night?" in instruction.prompt(template)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "malformed JSON"),
        ({"a": 1}, "must be a list of pairs"),
        ([["a"]], "list of pairs"),
        ([["a", 1]], "a int"),
    ],
)
def test_malformed_history(value: Any, message: str) -> None:
    with pytest.raises(Refusal, match=f"here: .*{message}"):
        read_record("alpaca", {**ALPACA, "history": value}, "here")


def test_pairs() -> None:
    assert read_pair({"prompt": "a", "response": "b", "system": None}, "prompt", "response", "here") == (
        "a",
        "b",
    )
    with pytest.raises(Refusal, match="here: the field 'response' is missing") as refusal:
        read_pair({"prompt": "a"}, "prompt", "response", "here")
    assert refusal.value.reason is Reason.FIELDS
    with pytest.raises(Refusal, match="here: has the field 'system'"):
        read_pair({"prompt": "a", "response": "b", "system": "c"}, "prompt", "response", "here")
    with pytest.raises(Refusal, match="here: the field 'prompt' holds half"):
        read_pair({"prompt": "\ud83d", "response": "b"}, "prompt", "response", "here")
