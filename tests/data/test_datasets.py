"""Samples and batches of a training run, and what is refused before it starts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.training import global_vars
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from transformers import AutoTokenizer

from megatron_fdd.data.datasets import InstructionDataset, TextDataset, instruction_sample
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.megatron_tokenizer import load_tokenizer
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.provider import (
    build_datasets,
    check_data_args,
    get_batch,
    train_valid_test_provider,
)
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import megatron_args, sentences, write_jsonl
from tests.harness.ranks import distributed

KEYS = {"tokens", "labels", "loss_mask", "token_mask", "position_ids"}


def as_megatron_makes_it(prefix: Path, documents: list[list[int]]) -> str:
    """Write a set as Megatron's own tools write it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_instruction_sample_shifts_and_pads() -> None:
    sample = instruction_sample(np.array([5, 6, 7, 8], np.uint16), np.array([0, 0, 1, 1], np.uint8), 6)
    assert sample["tokens"].tolist() == [5, 6, 7, 0, 0, 0]
    assert sample["labels"].tolist() == [6, 7, 8, 0, 0, 0]
    assert sample["loss_mask"].tolist() == [0, 1, 1, 0, 0, 0]
    assert sample["token_mask"].tolist() == [1, 1, 1, 0, 0, 0]
    assert sample["position_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    assert sample["loss_mask"].dtype == sample["token_mask"].dtype == torch.float32


def test_instruction_epochs_visit_every_document_once_and_differ(sets: Path, hf: TokenizerSettings) -> None:
    args = megatron_args("--data-path", str(sets / "instruction"), "--split", "80,20,0")
    train, valid, test = build_datasets(args, [70, 8, 8], load_tokenizer(hf))
    assert isinstance(train, InstructionDataset)
    assert test is None
    assert (len(train), len(valid)) == (96, 8)
    epochs = train._order.reshape(3, 32)
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    again, _, _ = build_datasets(args, [70, 8, 8], load_tokenizer(hf))
    assert all(torch.equal(train[i][key], again[i][key]) for i in range(96) for key in KEYS)
    for index in range(len(train)):
        sample = train[index]
        assert set(sample) == KEYS
        assert 0 < sample["loss_mask"].sum() < sample["token_mask"].sum()
        assert (sample["loss_mask"] <= sample["token_mask"]).all()


def test_text_samples_have_megatrons_masks_and_ours(
    sets: Path, hf: TokenizerSettings, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(hf)
    args = megatron_args(
        *("--data-path", str(sets / "text"), "--split", "80,20,0", "--eod-mask-loss"),
        *("--data-cache-path", str(tmp_path)),
    )
    train, valid, _ = build_datasets(args, [10, 2, 2], tokenizer)
    assert isinstance(train, TextDataset)
    assert isinstance(valid, TextDataset)
    ends = 0
    for index in range(10):
        sample = train[index]
        assert set(sample) == KEYS
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        is_end = sample["tokens"] == tokenizer.eod
        assert torch.equal(sample["loss_mask"], 1.0 - is_end.float())
        assert sample["token_mask"].all()
        ends += int(is_end.sum())
    assert ends > 0


def test_padding_inside_text_is_no_token(hf: TokenizerSettings, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hf)
    prefix = as_megatron_makes_it(tmp_path / "own", [[10, 11, tokenizer.pad, 12] * 20] * 4)
    args = megatron_args("--data-path", prefix, "--split", "1,0,0", "--eval-iters", "0")
    args.data_cache_path = str(tmp_path / "cache")
    check_data_args(args, tokenizer)
    train, _, _ = build_datasets(args, [6, 0, 0], tokenizer)
    for index in range(6):
        sample = train[index]
        padded = sample["token_mask"] == 0
        assert padded.sum() == 6
        assert (sample["tokens"][padded] == 0).all()
        assert (sample["tokens"][~padded] >= 10).all()


def test_tokenizer_without_padding_token(hf: TokenizerSettings, tmp_path: Path) -> None:
    without = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    without.pad_token = None
    without.save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(TokenizerSettings(hf.tokenizer_type, str(tmp_path / "tokenizer")))
    assert tokenizer.pad is None
    prefix = as_megatron_makes_it(tmp_path / "own", [[0, 10, 11, 12] * 20] * 4)
    args = megatron_args("--data-path", prefix, "--split", "1,0,0", "--eval-iters", "0")
    train, _, _ = build_datasets(args, [6, 0, 0], tokenizer)
    assert train[0]["token_mask"].all()
    assert train[0]["loss_mask"].all()


def test_prepared_again_is_not_read_with_the_old_index(hf: TokenizerSettings, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hf)
    args = megatron_args("--data-path", str(tmp_path / "set"), "--split", "1,0,0", "--eval-iters", "0")
    for count in (50, 20):
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(count)])
        prepare(PrepareSettings((path,), str(tmp_path / "set"), EncodeSettings(hf, "jsonl"), overwrite=True))
        train, _, _ = build_datasets(args, [5, 0, 0], tokenizer)
        assert sorted(train.document_index.tolist()) == list(range(count))


def test_no_evaluation_builds_no_evaluation_data(sets: Path, hf: TokenizerSettings) -> None:
    """The default split is then accepted, although it leaves 60 documents no test part."""
    tokenizer = load_tokenizer(hf)
    args = megatron_args("--data-path", str(sets / "text"), "--eval-iters", "0")
    check_data_args(args, tokenizer)
    args.split = "90,5,5"
    train, valid, test = build_datasets(args, [10, 0, 0], tokenizer)
    assert len(train) >= 10
    assert (valid, test) == (None, None)


def test_mock_data(hf: TokenizerSettings) -> None:
    args = megatron_args("--mock-data")
    check_data_args(args, load_tokenizer(hf))
    train, valid, test = build_datasets(args, [4, 2, 2], load_tokenizer(hf))
    assert [set(dataset[0]) for dataset in (train, valid, test)] == [KEYS] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "{sets}/nowhere"], "nowhere.bin does not exist"),
        (
            ["--data-path", "{sets}/text"],
            r"the test part of .*text has 0 documents .*60 documents, --split is 969",
        ),
        (["--data-path", "{sets}/text", "--split", "100,0,0"], "no validation data: --split 100,0,0"),
        (["--train-data-path", "{sets}/text"], "no validation data: it has no data path of its own"),
        (["--data-path", "1", "{sets}/text", "1", "{sets}/instruction"], "one run reads one kind"),
        (
            ["--data-path", "{sets}/instruction", "--seq-length", "16"],
            "of 24 tokens and --seq-length 16 holds 17",
        ),
        (["--data-path", "{sets}/text", "--mock-data"], "exclude each other"),
        ([], "no data: give --data-path"),
        (["--data-path", "{sets}/text", "--sft"], "--sft is Megatron's own"),
        (["--data-path", "{sets}/text", "--fim-data"], "--fim-data is not supported"),
        (
            ["--data-path", "{sets}/text", "--full-validation", "--multiple-validation-sets"],
            "--full-validation with test data.*share of 0",
        ),
        (
            ["--data-path", "{sets}/text", "--dataloader-inter-document-masking", "--reset-attention-mask"],
            "leave one out",
        ),
        (["--data-path", "{sets}/text", "--data-cache-path", "{sets}/text.jsonl/x"], "not a writable folder"),
    ],
)
def test_refused(sets: Path, hf: TokenizerSettings, flags: list[str], message: str) -> None:
    args = megatron_args(*(flag.format(sets=sets) for flag in flags))
    with pytest.raises(ValueError, match=message):
        check_data_args(args, load_tokenizer(hf))


def test_read_only_folder_is_refused_unless_the_cache_is_elsewhere(
    sets: Path, hf: TokenizerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(sets)))
    args = megatron_args("--data-path", str(sets / "text"), "--split", "90,10,0")
    with pytest.raises(ValueError, match="--data-cache-path"):
        check_data_args(args, load_tokenizer(hf))
    args.data_cache_path = str(tmp_path / "not" / "yet")
    check_data_args(args, load_tokenizer(hf))


def test_flags_without_effect_are_named(sets: Path, hf: TokenizerSettings) -> None:
    args = megatron_args("--data-path", str(sets / "instruction"), "--split", "90,10,0", "--eod-mask-loss")
    with pytest.warns(UserWarning, match="--eod-mask-loss: no effect on instructions"):
        check_data_args(args, load_tokenizer(hf))
    args.rank = 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no effect")
        check_data_args(args, load_tokenizer(hf))


def test_batch_leaves_the_dict_alone_and_has_a_mask_only_when_asked() -> None:
    sample = {key: torch.ones(2, 3) for key in KEYS}
    before = dict(sample)
    batch = get_batch(iter([sample]), "cpu")
    assert sample == before
    assert batch.attention_mask is None
    with_mask = get_batch(
        iter([{**sample, "attention_mask": torch.ones(2, 1, 3, 3, dtype=torch.bool)}]), "cpu"
    )
    assert with_mask.attention_mask.shape == (2, 1, 3, 3)


@distributed(cp=2)
def test_a_blends_number_is_not_cut_along_the_sequence() -> None:
    """Megatron's blend adds it to each sample; an own data set may add anything."""
    sample = {key: torch.arange(16).view(2, 8) for key in KEYS} | {"dataset_id": torch.tensor([0, 1])}
    group = parallel_state.get_context_parallel_group()
    batch = get_batch(iter([sample]), "cpu", group)
    wanted = [[0, 1, 6, 7], [2, 3, 4, 5]][group.rank()]
    assert batch.tokens_BS.tolist() == [wanted, [each + 8 for each in wanted]]


def test_reset_attention_mask_reaches_the_batch(sets: Path, hf: TokenizerSettings, tmp_path: Path) -> None:
    args = megatron_args("--data-path", str(sets / "text"), "--split", "90,10,0", "--reset-attention-mask")
    args.data_cache_path = str(tmp_path)
    train, _, _ = build_datasets(args, [4, 2, 2], load_tokenizer(hf))
    sample = train[0]
    end = int((sample["tokens"] == load_tokenizer(hf).eod).nonzero()[0])
    assert end + 1 < 24
    assert sample["attention_mask"][0, end + 1, end]
    assert not sample["attention_mask"][0, end + 1, end + 1]


@distributed(dp=2)
def test_provider_on_two_ranks_reads_disjoint_samples(
    sets: Path, hf: TokenizerSettings, tmp_path: Path
) -> None:
    """Megatron's loader reads them; rank 0 builds the index, rank 1 reads it."""
    rank = torch.distributed.get_rank()
    for name in ("text", "instruction"):
        args = megatron_args("--data-path", str(sets / name), "--split", "80,20,0")
        args.data_cache_path, args.rank = str(tmp_path), rank
        tokenizer = load_tokenizer(hf)
        check_data_args(args, tokenizer)
        saved = global_vars._GLOBAL_ARGS, global_vars._GLOBAL_TOKENIZER
        global_vars._GLOBAL_ARGS, global_vars._GLOBAL_TOKENIZER = args, tokenizer
        try:
            train, valid, test = train_valid_test_provider([16, 4, 4], vp_stage=0)
            loader: Iterator = iter(build_pretraining_data_loader(train, 0))
        finally:
            global_vars._GLOBAL_ARGS, global_vars._GLOBAL_TOKENIZER = saved
        assert test is None
        assert len(valid) >= 4
        batches = [get_batch(loader, "cpu") for _ in range(4)]
        for step, batch in enumerate(batches):
            assert batch.tokens_BS.shape == batch.labels_BS.shape == batch.position_ids_BS.shape == (2, 24)
            assert batch.loss_mask_BS.shape == batch.token_mask_BS.shape == (2, 24)
            first = step * 4 + rank * 2
            assert torch.equal(batch.tokens_BS[0], train[first]["tokens"])
            assert torch.equal(batch.token_mask_BS[1], train[first + 1]["token_mask"])
