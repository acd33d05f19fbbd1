"""Two tokenizers are the same when their base vocabulary is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_fdd.convert import compare_tokenizers, has_tokenizer, tokenizer_identity
from megatron_fdd.convert.tokenizer import IDENTITY_FILE, TokenizerIdentity, copy_tokenizer
from tests.convert import toys


def test_added_tokens_are_an_allowed_difference(tmp_path: Path) -> None:
    toys.make_tokenizer(tmp_path / "base", added=())
    toys.make_tokenizer(tmp_path / "chat", added=("<|im_start|>", "<|im_end|>"))
    base, chat = tokenizer_identity(tmp_path / "base"), tokenizer_identity(tmp_path / "chat")
    assert base.base_hash == chat.base_hash
    assert (base.added, set(chat.added)) == ({}, {"<|im_start|>", "<|im_end|>"})
    assert chat.num_tokens == base.num_tokens + 2
    assert compare_tokenizers(base, chat) is None


def test_a_difference_names_the_first_ids() -> None:
    first = TokenizerIdentity({"a": 0, "b": 1, "c": 2}, {})
    second = TokenizerIdentity({"a": 0, "c": 1, "b": 2, "d": 3}, {})
    difference = compare_tokenizers(first, second)
    assert difference is not None
    assert "3 and 4 tokens" in difference
    assert "3 ids" in difference
    assert "1: 'b' / 'c', 2: 'c' / 'b', 3: None / 'd'" in difference
    assert compare_tokenizers(first, TokenizerIdentity(dict(reversed(first.base.items())), {"x": 9})) is None


def test_another_vocabulary_is_a_difference(tmp_path: Path) -> None:
    toys.make_tokenizer(tmp_path / "one")
    toys.make_tokenizer(tmp_path / "other", vocab_size=60)
    identities = [tokenizer_identity(tmp_path / name) for name in ("one", "other")]
    assert compare_tokenizers(*identities) is not None


def test_sentencepiece_alone_and_with_its_json_agree(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
    )
    toys.write_json(tmp_path / "added_tokens.json", {"<s>": 1, "<|chat|>": 40})
    identity = tokenizer_identity(tmp_path)
    assert identity.num_tokens == 41
    assert identity.added == {"<|chat|>": 40}
    pieces = sorted(identity.base, key=identity.base.__getitem__)
    # A Unigram tokenizer.json lists [piece, score] in the order of ids.
    toys.write_json(tmp_path / "tokenizer.json", {"model": {"vocab": [[piece, 0.0] for piece in pieces]}})
    assert tokenizer_identity(tmp_path).base_hash == identity.base_hash
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        tokenizer_identity(tmp_path)


def test_vocabulary_files_of_slow_tokenizers(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        tokenizer_identity(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    from_text = tokenizer_identity(tmp_path)
    toys.write_json(tmp_path / "vocab.json", {"b": 1, "a": 0})
    assert tokenizer_identity(tmp_path).base_hash == from_text.base_hash
    decoder = {"1": {"content": "b"}, "2": {"content": "<|chat|>"}}
    toys.write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    assert tokenizer_identity(tmp_path).added == {"<|chat|>": 2}


def test_copies_carry_their_identity(tmp_path: Path) -> None:
    toys.make_tokenizer(tmp_path / "source")
    copy_tokenizer(tmp_path / "source", tmp_path / "copy")
    identity = tokenizer_identity(tmp_path / "copy")
    stored = json.loads((tmp_path / "copy" / IDENTITY_FILE).read_text())
    assert stored == {"vocab_size": identity.num_tokens, "vocab_hash": identity.base_hash}
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", IDENTITY_FILE}
