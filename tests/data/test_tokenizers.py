"""The tokenizer of a run, which must be the one with which its data was prepared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_fdd.data.checks import check_data_args
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.megatron_tokenizer import load_tokenizer
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import megatron_args, sentences, write_jsonl


def changed(hf: TokenizerSettings, folder: Path, changes: dict[str, object]) -> TokenizerSettings:
    """Copy the tokenizer, with other parts in its tokenizer.json."""
    shutil.copytree(hf.tokenizer_model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    return TokenizerSettings(hf.tokenizer_type, str(folder))


def test_a_set_of_the_former_version_is_compared_by_its_vocabulary(
    sets: Path, hf: TokenizerSettings, tmp_path: Path
) -> None:
    for end in (".bin", ".idx"):
        shutil.copy(sets / f"text{end}", tmp_path / f"text{end}")
    tokenizer = load_tokenizer(hf)
    lines = "".join(f"{index}\t{token!r}\n" for index, token in sorted(tokenizer.inv_vocab.items()))
    values = json.loads((sets / "text.prepared.json").read_text())
    assert values["smallest_token_id"] == 0  # the id that ends a document
    assert values["tokenizer"]["added"] == {
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
        "<pad>": 3,
    }
    del values["smallest_token_id"]
    digest = hashlib.sha256(lines.encode()).hexdigest()
    former = {"vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "vocabulary_sha256": digest}
    path = tmp_path / "text.prepared.json"
    path.write_text(json.dumps({**values, "version": 1, "tokenizer": former}))
    args = megatron_args("--data-path", str(tmp_path / "text"), "--split", "90,10,0")
    with pytest.warns(UserWarning, match="prepared by an older version: only its vocabulary is compared"):
        check_data_args(args, tokenizer)
    path.write_text(json.dumps({**values, "version": 1, "tokenizer": {**former, "vocabulary_sha256": "0"}}))
    with (
        pytest.warns(UserWarning, match="older version"),
        pytest.raises(ValueError, match="not all ids mean the same"),
    ):
        check_data_args(args, tokenizer)
    path.write_text(json.dumps({**values, "version": 3, "tokenizer": former}))
    with pytest.raises(ValueError, match="not megatron_fdd.data version 2"):
        check_data_args(args, tokenizer)


def test_a_chosen_end_of_documents_is_written_and_known(hf: TokenizerSettings, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in sentences(30)])
    settings = dataclasses.replace(hf, eod_token="<|im_end|>")
    summary = prepare(
        PrepareSettings((text,), str(tmp_path / "text"), EncodeSettings(settings, "jsonl", append_eod=True))
    )
    written = IndexedDataset(str(tmp_path / "text"))
    assert [written[index][-1] for index in range(30)] == [2] * 30
    assert summary.eod == "<|im_end|>"
    flags = ["--data-path", str(tmp_path / "text"), "--split", "90,10,0"]
    check_data_args(megatron_args(*flags), load_tokenizer(hf))
    with pytest.raises(
        ValueError, match=r"--reset-position-ids looks for the end token .* id 0, and .* with id 2"
    ):
        check_data_args(megatron_args(*flags, "--reset-position-ids"), load_tokenizer(hf))
    check_data_args(megatron_args(*flags, "--reset-position-ids"), load_tokenizer(settings))


def test_another_tokenizer_is_refused(
    sets: Path, hf: TokenizerSettings, sp: TokenizerSettings, tmp_path: Path
) -> None:
    args = megatron_args("--data-path", str(sets / "text"), "--split", "90,10,0")
    with pytest.raises(ValueError, match=r"id 0 is '<.endoftext.>' in the data and '<unk>' in this run"):
        check_data_args(args, load_tokenizer(sp))
    content = json.loads((Path(hf.tokenizer_model) / "tokenizer.json").read_text())
    last = max(content["added_tokens"], key=lambda entry: entry["id"])
    size = len(content["model"]["vocab"])
    larger = {"added_tokens": [*content["added_tokens"], {**last, "id": size, "content": "<new>"}]}
    check_data_args(args, load_tokenizer(changed(hf, tmp_path / "larger", larger)))
    renamed = {
        "added_tokens": [
            {**e, "content": e["content"].replace("im_", "IM_")} for e in content["added_tokens"]
        ]
    }
    words = {token.replace("im_", "IM_"): index for token, index in content["model"]["vocab"].items()}
    renamed["model"] = {**content["model"], "vocab": words}
    whole = (
        r"{}.text was prepared with a tokenizer that is not this run's: {}; use the same --tokenizer-model"
    )
    message = r"id 1 is '<.im_start.>' in the data and '<.IM_start.>' in this run"
    with pytest.raises(ValueError, match=whole.format(sets, message)):
        check_data_args(args, load_tokenizer(changed(hf, tmp_path / "renamed", renamed)))
    lower = {"normalizer": {"type": "Lowercase"}}
    with pytest.raises(ValueError, match=whole.format(sets, 'the probe line ".*differ: normaliser.*')):
        check_data_args(args, load_tokenizer(changed(hf, tmp_path / "lower", lower)))
    # A set of unknown origin has only its ids to check.
    own = IndexedDatasetBuilder(str(tmp_path / "own.bin"), dtype=np.int32)
    for _ in range(30):
        own.add_document(np.array([1, 500], np.int32), [2])
    own.finalize(str(tmp_path / "own.idx"))
    args.data_path = [str(tmp_path / "own")]
    with pytest.raises(ValueError, match="has the token id 500"):
        check_data_args(args, load_tokenizer(hf))


def test_an_end_that_the_tokenizer_lacks(hf: TokenizerSettings, sp: TokenizerSettings) -> None:
    with pytest.raises(ValueError, match=r"--eod-token <x>: .* has no such token; give one that it has"):
        load_tokenizer(dataclasses.replace(hf, eod_token="<x>"))
    with pytest.raises(ValueError, match="--eod-token </s>: a SentencePiece model names its own"):
        load_tokenizer(dataclasses.replace(sp, eod_token="</s>"))


def test_a_tokenizer_that_is_not_its_file_does_not_prepare(hf: TokenizerSettings, tmp_path: Path) -> None:
    settings = changed(hf, tmp_path / "lower", {"normalizer": {"type": "Lowercase"}})
    path = tmp_path / "lower" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(
        ValueError, match=r"lower loads as GPT2Tokenizer, which .*fdd import.*PreTrainedTokenizerFast"
    ):
        load_tokenizer(settings)
