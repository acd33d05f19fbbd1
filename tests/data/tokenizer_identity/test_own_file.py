"""The checks that transformers loads what tokenizer.json says, and that a stored identity belongs to its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_fdd.data.tokenizer_identity import (
    TokenizerIdentity,
    checked_identity,
    compare,
    difference_from_file,
    identity_of_folder,
    stored_identity,
    write_stamp,
)
from tests.data.tokenizer_identity import variants

# tokenizer_class and model_type; whether the loaded tokenizer follows the file, as seen with transformers 5.23.
ROUTES = {
    ("PreTrainedTokenizerFast", None): True,
    ("LlamaTokenizerFast", None): True,
    ("PreTrainedTokenizerFast", "qwen2"): False,
    ("LlamaTokenizerFast", "qwen2"): False,
    ("GPT2Tokenizer", None): False,
}


@pytest.mark.parametrize(("name", "model_type"), ROUTES)
def test_a_class_that_builds_the_tokenizer_anew_is_noticed(
    name: str, model_type: str | None, tmp_path: Path
) -> None:
    content = variants.variant(variants.with_pattern(variants.SMALL_CONTRACTIONS.replace("{1,3}", "{1,2}")))
    variants.write(tmp_path, content, tokenizer_class=name)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    library = AutoTokenizer.from_pretrained(tmp_path)
    text = "12345 'REALLY"
    follows = library(text, add_special_tokens=False)["input_ids"] == identity_of_folder(tmp_path).encode(
        text
    )
    assert follows == ROUTES[name, model_type]
    difference = difference_from_file(library)[1]
    assert (difference is None) == follows
    if not follows:
        with pytest.raises(
            ValueError, match=r"loads as \w+, which does not do what its tokenizer.json says: the probe"
        ):
            checked_identity(library)


def test_flags_and_tokens_of_the_config_are_no_difference_from_the_file(tmp_path: Path) -> None:
    index = max(entry["id"] for entry in variants.base()["added_tokens"])
    flags = {"special": True, "lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
    decoder = {
        str(index): {**flags, "content": "<|im_end|>"},
        str(index + 1): {**flags, "content": "<|config|>"},
    }
    variants.write(tmp_path, added_tokens_decoder=decoder)
    loaded, difference = difference_from_file(AutoTokenizer.from_pretrained(tmp_path))
    assert difference is None
    assert loaded.vocabulary["<|config|>"] == index + 1
    of_files = identity_of_folder(tmp_path)
    assert of_files.vocabulary["<|config|>"] == index + 1
    # Flags matter between two loaded tokenizers; a token that `encode` does not find does not matter.
    found = compare(of_files, loaded)
    assert found.difference is not None
    assert "with the added token '<|im_end|>'" in found.difference
    assert compare(of_files, loaded, with_added_texts=False).difference is None
    del decoder[str(index)]
    variants.write(tmp_path, added_tokens_decoder=decoder)
    loaded = checked_identity(AutoTokenizer.from_pretrained(tmp_path))
    of_files = identity_of_folder(tmp_path)
    assert compare(of_files.stamp, loaded).difference is None
    assert compare(loaded.stamp, of_files).difference is None


def test_a_stored_identity_is_believed_while_its_files_stay(tmp_path: Path) -> None:
    assert stored_identity(tmp_path) is None
    folder = variants.write(tmp_path / "tokenizer")
    assert isinstance(stored_identity(folder), TokenizerIdentity)
    identity = identity_of_folder(folder)
    write_stamp(folder, identity)
    stamp = identity.stamp
    assert stored_identity(folder) == stamp
    variants.write(folder, variants.variant(variants.swap_words))
    anew = stored_identity(folder)
    assert isinstance(anew, TokenizerIdentity)
    assert anew.stamp.words_sha256 != stamp.words_sha256
    # An older version wrote it like this.
    (folder / "fdd_tokenizer.json").write_text(json.dumps({"vocab_size": 5, "vocab_hash": "x"}))
    assert isinstance(stored_identity(folder), TokenizerIdentity)
    write_stamp(folder, identity)
    values = json.loads((folder / "fdd_tokenizer.json").read_text())
    del values["probe"]
    (folder / "fdd_tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"fdd_tokenizer.json does not hold the identity of a tokenizer .*delete it"
    ):
        stored_identity(folder)
