"""The valid inputs that the fuzzer changes, made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_fdd import convert
from megatron_fdd.convert.student import init_student
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.convert import toys
from tests.data.chat_templates import CHATML

VARIANTS = (*toys.VARIANTS, "gpt2")
TEXTS = [{"text": "the quick brown fox jumps over the lazy dog " * 3} for _ in range(20)]
CHATS: list[dict[str, Any]] = [
    {"text": "the quick brown fox"},
    {"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the dog"}]},
    {
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c", "reasoning_content": "d", "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"a": [1, {"b": None}]}}}]},
            {"role": "tool", "content": "e", "name": "f"},
            {"role": "assistant", "content": "g"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "the fox", "response": "the dog"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["a", "b"]]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"query": "a", "tools": "[]", "answers": '[{"name": "f", "arguments": {}}]'},
]  # fmt: skip


def root_of(folder: Path) -> Path:
    """Return the folder of what `make_toys` has made."""
    return folder.parent / "toys"


def make_toys(root: Path) -> None:
    """Make the valid inputs, in a process of its own."""
    place = root / "toys"
    for name, changes in (
        ("teacher", {}),
        ("student", {"hidden_size": 24}),
        ("moe", {"variant": "qwen3_moe"}),
    ):
        toys.make_llama(place / f"{name}-hf", **changes)
        toys.make_tokenizer(place / f"{name}-hf", added=("<|im_start|>", "<|im_end|>"))
        (place / f"{name}-hf/chat_template.jinja").write_text(CHATML)
        convert.hf_to_mcore(place / f"{name}-hf", place / name)
    init_student(place / "teacher-hf", [0, 2], place / "shards", max_shard_size="50KB")
    lines = "".join(json.dumps(each) + "\n" for each in TEXTS)
    (place / "text.jsonl").write_text(lines)
    encode = EncodeSettings(tokenizer_settings(place), "jsonl", append_eod=True)
    prepare(PrepareSettings((str(place / "text.jsonl"),), str(place / "text"), encode))


def tokenizer_settings(place: Path) -> TokenizerSettings:
    """Return the tokenizer of the toys."""
    return TokenizerSettings("HuggingFaceTokenizer", str(place / "teacher-hf"))
