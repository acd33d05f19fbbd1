"""Identities read from the files that a folder may hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from megatron_fdd.data.tokenizer import check_tokenizer_files
from megatron_fdd.data.tokenizer_identity import compare, has_tokenizer, identity_of_folder
from tests.convert import toys
from tests.data.tokenizer_identity import variants


def test_sentencepiece_alone_and_with_its_json_agree(tmp_path: Path) -> None:
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
    identity = identity_of_folder(tmp_path)
    assert len(identity.vocabulary) == 41
    assert identity.added == {"<|chat|>": 40}
    assert identity.encode is not None
    assert [identity.token_of[index] for index in identity.encode("the")] == ["▁the"]
    pieces = [[identity.token_of[index], 0.0] for index in range(40)]
    model = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    toys.write_json(tmp_path / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": model})
    found = compare(identity.stamp, identity_of_folder(tmp_path))
    assert found.difference is None
    assert found.remarks == (
        "only the vocabularies were compared, as the first is read by 'sentencepiece' and the second by 'tokenizers'",
    )
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        identity_of_folder(tmp_path)


def test_vocabulary_files_of_slow_tokenizers(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        identity_of_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    from_text = identity_of_folder(tmp_path)
    toys.write_json(tmp_path / "vocab.json", {"b": 1, "a": 0})
    assert compare(identity_of_folder(tmp_path), from_text).difference is None
    decoder = {"1": {"content": "b"}, "2": {"content": "<|chat|>"}}
    toys.write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    assert identity_of_folder(tmp_path).added == {"<|chat|>": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "has no model.vocab"),
        ({"model": {"vocab": {"a": 0}}}, "cannot be read as a tokenizer"),
    ],
)
def test_a_file_that_is_no_tokenizer(content: dict[str, object], message: str, tmp_path: Path) -> None:
    toys.write_json(tmp_path / "tokenizer.json", content)
    with pytest.raises(ValueError, match=message):
        identity_of_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("gone")])
def test_what_is_no_file_does_not_count_as_not_there(
    put: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    """A cache of the hub that was cleaned keeps its links."""
    variants.write(tmp_path)
    assert has_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    put(tmp_path / name)
    for look in (has_tokenizer, lambda folder: check_tokenizer_files("HuggingFaceTokenizer", str(folder))):
        with pytest.raises(ValueError, match=f"^{tmp_path / name} is no file"):
            look(tmp_path)
