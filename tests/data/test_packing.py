"""Several instructions in one sample: none is lost, and none sees another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_fdd.data.batch import get_batch
from megatron_fdd.data.megatron_tokenizer import load_tokenizer
from megatron_fdd.data.packing import PackedInstructionDataset, pack, packed_sample
from megatron_fdd.data.provider import build_datasets
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import megatron_args, sets

__all__ = ["sets"]  # the fixture


def test_packs_are_as_full_as_the_order_allows() -> None:
    assert pack(np.array([3, 3, 4, 10, 1, 0, 9, 2]), 10).tolist() == [3, 4, 7, 8]


@pytest.mark.parametrize("seed", range(5))
def test_no_pack_is_too_full_and_none_could_take_the_next(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(0, 9, 40)
    ends = pack(lengths, 8).tolist()
    assert ends[-1] == len(lengths)
    for first, last in zip([0, *ends], ends, strict=False):
        assert sum(lengths[first:last]) <= 8
        assert last == len(lengths) or sum(lengths[first : last + 1]) > 8


def test_a_sample_shifts_inside_of_each_instruction() -> None:
    first = (np.array([5, 6, 7], np.uint16), np.array([0, 1, 1], np.uint8))
    second = (np.array([8, 9], np.uint16), np.array([0, 1], np.uint8))
    sample = packed_sample([first, second], 6)
    assert sample["tokens"].tolist() == [5, 6, 8, 0, 0, 0]
    assert sample["labels"].tolist() == [6, 7, 9, 0, 0, 0]
    assert sample["loss_mask"].tolist() == [1, 1, 1, 0, 0, 0]
    assert sample["token_mask"].tolist() == [1, 1, 1, 0, 0, 0]
    assert sample["position_ids"].tolist() == [0, 1, 0, 0, 1, 2]
    assert sample["cu_seqlens"].tolist() == [0, 2, 3, 6, 6, 6, 6]
    assert sample["max_seqlen"] == 3


def test_a_full_sample_has_no_empty_document() -> None:
    document = (np.array([5, 6, 7], np.uint16), np.array([0, 1, 1], np.uint8))
    assert packed_sample([document, document], 4)["cu_seqlens"].tolist() == [0, 2, 4, 4, 4]


def test_every_epoch_has_every_instruction_once(sets: Path, hf: TokenizerSettings) -> None:
    args = megatron_args(
        "--data-path", str(sets / "instruction"), "--split", "80,20,0", "--dataloader-inter-document-masking",
        "--seq-length", "60",
    )  # fmt: skip
    train, valid, _ = build_datasets(args, (40, 4, 0), load_tokenizer(hf))
    assert isinstance(train, PackedInstructionDataset)
    assert len(train) >= 40
    assert len(valid) >= 4
    seen = np.concatenate(list(train._order))
    counts = np.bincount(seen, minlength=40)
    assert counts[:32].min() == counts[:32].max() > 1  # whole epochs
    assert not counts[32:].any()
    assert max(len(documents) for documents in train._order) > 1


def test_a_micro_batch_becomes_one_row(sets: Path, hf: TokenizerSettings) -> None:
    args = megatron_args(
        "--data-path", str(sets / "instruction"), "--split", "80,20,0", "--dataloader-inter-document-masking",
        "--seq-length", "60",
    )  # fmt: skip
    train, _, _ = build_datasets(args, (4, 4, 0), load_tokenizer(hf))
    samples = torch.utils.data.default_collate([train[0], train[1]])
    batch = get_batch(iter([samples]), "cpu")
    assert batch.tokens_BS.shape == batch.token_mask_BS.shape == (1, 120)
    assert torch.equal(batch.labels_BS[0], samples["labels"].flatten())
    assert batch.packed is not None
    boundaries = batch.packed.cu_seqlens_q
    assert boundaries.tolist() == sorted(set(boundaries.tolist()))
    assert 60 in boundaries
    assert boundaries[-1] == 120
    assert batch.packed.max_seqlen_q == boundaries.diff().max()
    begins = (batch.position_ids_BS[0] == 0).nonzero().flatten()
    assert torch.equal(begins, boundaries[:-1].long())
    assert "cu_seqlens" in samples  # Megatron may return the same dict again
    assert samples["tokens"].shape == (2, 60)
