"""The copy of a tokenizer beside a checkpoint: its files, its identity, and a class that does what the files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_fdd.convert.vocabulary import copy_tokenizer
from megatron_fdd.data.tokenizer_identity import (
    TokenizerStamp,
    check_copy,
    difference_from_file,
    stored_identity,
)
from tests.convert import toys
from tests.data.tokenizer_identity import variants


def test_copies_carry_their_identity(tmp_path: Path) -> None:
    toys.make_tokenizer(tmp_path / "source")
    copy_tokenizer(tmp_path / "source", tmp_path / "copy")
    assert isinstance(stored_identity(tmp_path / "copy"), TokenizerStamp)
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "fdd_tokenizer.json"}
    for name in names - {"fdd_tokenizer.json"}:
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


PADDING = {
    "strategy": "BatchLongest",
    "direction": "Left",
    "pad_to_multiple_of": 8,
    "pad_id": 3,
    "pad_type_id": 0,
    "pad_token": "<|end|>",
}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
TEXT = "a box of 1234 foxes<|end|> x, and two <pad> more"


def ids_of(folder: Path) -> list[int]:
    return list(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])


def test_padding_and_truncation_are_copied_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = variants.base()
    variants.write(tmp_path / "plain", base)
    file = variants.write(tmp_path / "source", {**base, "padding": PADDING, "truncation": TRUNCATION}) / (
        "tokenizer.json"
    )
    copy_tokenizer(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == file.read_bytes()
    assert capsys.readouterr().err == ""
    assert ids_of(tmp_path / "copy") == ids_of(tmp_path / "plain")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").pad_token == "<|end|>"


@pytest.mark.parametrize(
    "lengths", [{"padding": {**PADDING, "pad_token": "x"}}, {"truncation": {**TRUNCATION, "stride": 3}}]
)
def test_lengths_that_would_change_ids_are_left_out(
    tmp_path: Path, lengths: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = variants.base()
    variants.write(tmp_path / "plain", base)
    variants.write(tmp_path / "source", {**base, **lengths})
    copy_tokenizer(tmp_path / "source", tmp_path / "copy")
    (name,) = lengths
    said = capsys.readouterr().err
    assert (
        f"source: {name} of its tokenizer.json would change the ids of a text; the checkpoint's copy" in said
    )
    copied = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    assert copied == {**base, name: None}
    assert ids_of(tmp_path / "copy") == ids_of(tmp_path / "plain")


def test_a_copy_that_is_damaged_is_refused(tmp_path: Path) -> None:
    variants.write(tmp_path / "source")
    copy = tmp_path / "copy"
    copy_tokenizer(tmp_path / "source", copy)
    check_copy(copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "y"}))
    check_copy(copy)  # a template is no part of it
    whole = (copy / "tokenizer.json").read_text()
    variants.write(copy, variants.variant(variants.swap_words))
    with pytest.raises(
        ValueError, match=f"^{copy} is not the tokenizer that was copied there: .*delete fdd_"
    ):
        check_copy(copy)
    (copy / "fdd_tokenizer.json").unlink()
    check_copy(copy)  # changed on purpose
    (copy / "tokenizer.json").write_text(whole.replace('"', "!", 1))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not valid JSON"):
        check_copy(copy)


def test_a_copy_names_a_class_that_does_what_the_file_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = variants.variant(variants.with_pattern(variants.ONE_DIGIT))
    variants.write(tmp_path / "source", content, tokenizer_class="GPT2Tokenizer", chat_template="x")
    copy_tokenizer(tmp_path / "source", tmp_path / "copy")
    said = capsys.readouterr().err
    assert 'source: its tokenizer does not load as its tokenizer.json says (the probe line "digits"' in said
    written = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert written == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": "x",
    }
    library = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert difference_from_file(library)[1] is None
    assert (library.eos_token, library.chat_template) == ("<|end|>", "x")


def test_a_tokenizer_that_transformers_cannot_load_is_copied_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants.write(tmp_path / "source", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    copy_tokenizer(tmp_path / "source", tmp_path / "copy")
    assert "transformers cannot load this tokenizer, so only its files are known" in capsys.readouterr().err
    assert isinstance(stored_identity(tmp_path / "copy"), TokenizerStamp)
