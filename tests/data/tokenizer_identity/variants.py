"""One small byte-level tokenizer, and variants of its tokenizer.json that each differ in one thing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Content = dict[str, Any]
ADDED = ("<|end|>", "<|im_start|>", "<|im_end|>")
PATTERN = (
    r"(?i:'(?:s|t|re|ve|m|ll|d))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SMALL_CONTRACTIONS = PATTERN.replace("(?i:'(?:s|t|re|ve|m|ll|d))", "'(?:s|t|re|ve|m|ll|d)")
ONE_DIGIT = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CORPUS = [
    "The quick brown fox doesn't jump: it's 1234 years, we'll see 567 dogs and 12 cats.\n\nYou're HTTPServer 'REAL",
    "café é naïve Å ﬁ ½ 東京都 Привет мир 🙂👨‍👩‍👧 def f(x):\n    return x ** 2\n\tif x > 100:",
    "IDEALLY REALLY SURREALLY I'LL DON'T 'REALLY 'LLAMA THEY'RE  two  spaces    four (a) [b] {c} <div>x</div> --- .",
]


@cache
def _base() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _split(PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens(list(ADDED))
    return tokenizer.to_str()


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def base() -> Content:
    """Return the tokenizer.json from which the others differ."""
    return dict(json.loads(_base()))


def write(folder: Path, content: Content | None = None, **config: object) -> Path:
    """Make a folder with the two files that transformers reads; `config` goes into tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(base() if content is None else content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def variant(change: Callable[[Content], object]) -> Content:
    """Return the base with a change."""
    content = copy.deepcopy(base())
    change(content)
    return content


def with_pattern(pattern: str) -> Callable[[Content], object]:
    def change(content: Content) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}

    return change


def swap_words(content: Content) -> None:
    """Exchange the ids of two words."""
    words = content["model"]["vocab"]
    first, second = (token for token, index in words.items() if index in (300, 301))
    words[first], words[second] = words[second], words[first]


def swap_unrelated_merges(content: Content) -> None:
    """Exchange two neighbouring merges that never compete in a text."""
    merges = content["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


def flag_added(name: str, **flags: bool) -> Callable[[Content], object]:
    def change(content: Content) -> None:
        next(entry for entry in content["added_tokens"] if entry["content"] == name).update(flags)

    return change


def rename_added(old: str, new: str) -> Callable[[Content], object]:
    def change(content: Content) -> None:
        next(entry for entry in content["added_tokens"] if entry["content"] == old)["content"] = new

    return change


def drop_added(content: Content) -> None:
    content["added_tokens"].pop()


def add_added(content: Content) -> None:
    last = content["added_tokens"][-1]
    content["added_tokens"].append({**last, "id": last["id"] + 1, "content": "<|new|>"})
