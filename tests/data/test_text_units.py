"""`--fdd-text-units documents`: documents of plain text are cut once, and every epoch and seed has the same pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_fdd.data.checks import check_data_args
from megatron_fdd.data.datasets import DocumentSet
from megatron_fdd.data.megatron_tokenizer import load_tokenizer
from megatron_fdd.data.packing import PackedInstructionDataset
from megatron_fdd.data.provider import build_datasets
from megatron_fdd.data.store.unit import as_ids, unit_key, units_of
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import megatron_args, sets

__all__ = ["sets"]  # the fixture

LENGTH = 7


@pytest.fixture
def text(sets: Path) -> str:
    """Return the prefix of plain text."""
    return str(sets / "text")


def keys(text: str, hf: TokenizerSettings, *more: str, samples: int = 20) -> list[bytes]:
    """Return the keys of all units of a run's training samples, as often as they are read."""
    args = megatron_args(
        *("--data-path", text, "--split", "80,20,0", "--seq-length", str(LENGTH)),
        *("--dataloader-inter-document-masking", *more),
    )
    args.fdd_text_units = "documents"
    train, _, _ = build_datasets(args, (samples, 4, 0), load_tokenizer(hf))
    assert isinstance(train, PackedInstructionDataset)
    found = []
    for index in range(samples):
        sample = train[index]
        ids = sample["tokens"].numpy()
        found += [unit_key(as_ids(ids[first:last])) for first, last in units_of(sample)]
    return found


def test_every_token_is_a_label_once(text: str) -> None:
    documents, pieces = IndexedDataset(text), DocumentSet(text, mmap=True, sequence_length=LENGTH)
    labels = [ids[1:] for ids, mask in (pieces[index] for index in range(len(pieces))) if mask.all()]
    assert max(map(len, labels)) == LENGTH
    assert min(map(len, labels)) >= 1
    assert [len(ids) for ids, _ in (pieces[index] for index in range(len(pieces)))] == pieces.lengths.tolist()
    wanted = [documents[index][1:] for index in range(len(documents))]
    assert np.array_equal(np.concatenate(labels), np.concatenate(wanted))


def test_another_seed_reads_the_same_units(text: str, hf: TokenizerSettings) -> None:
    """A text's rows would all differ."""
    many = 400  # several epochs
    one, other = (set(keys(text, hf, "--seed", seed, samples=many)) for seed in ("1", "2"))
    assert one == other
    read = keys(text, hf, "--seed", "1", samples=many)
    assert len(read) > 2 * len(one)


def test_what_it_cannot_do_is_said(text: str, sets: Path, hf: TokenizerSettings) -> None:
    flags = ("--split", "80,20,0", "--seq-length", "60")
    args = megatron_args("--data-path", text, *flags)
    args.fdd_text_units = "documents"
    with pytest.warns(UserWarning, match="each row holds one piece of a document, and padding; give"):
        check_data_args(args, load_tokenizer(hf))
    args = megatron_args("--data-path", str(sets / "instruction"), *flags)
    args.fdd_text_units = "documents"
    with pytest.warns(UserWarning, match="no effect but on plain text"):
        check_data_args(args, load_tokenizer(hf))
    args = megatron_args("--data-path", "s3://bucket/text", *flags)
    args.fdd_text_units = "documents"
    with pytest.raises(ValueError, match="documents in object storage are not cut; copy the set"):
        check_data_args(args, load_tokenizer(hf))


def test_pieces_are_what_the_split_divides(text: str, hf: TokenizerSettings) -> None:
    """One part of a long document is enough for training, and another for validation."""
    documents = IndexedDataset(text)
    whole = str(Path(text).with_name("one"))
    builder = IndexedDatasetBuilder(f"{whole}.bin", dtype=np.uint16)
    ids = np.concatenate([documents[index] for index in range(len(documents))])
    builder.add_document(torch.from_numpy(ids.astype(np.int64)), [len(ids)])
    builder.finalize(f"{whole}.idx")
    args = megatron_args("--data-path", whole, "--split", "80,20,0", "--seq-length", "7")
    with pytest.raises(ValueError, match="has 0 documents and no token"):
        check_data_args(args, load_tokenizer(hf))
    args.fdd_text_units, args.dataloader_inter_document_masking = "documents", True
    check_data_args(args, load_tokenizer(hf))
    train, valid, _ = build_datasets(args, (4, 2, 0), load_tokenizer(hf))
    assert len(train) >= 4
    assert len(valid) >= 2
