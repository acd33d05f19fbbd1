"""Where a unit comes from, by its document; and the identity of a run's data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_fdd.data.full_validation import FilledDataset
from megatron_fdd.data.megatron_tokenizer import load_tokenizer
from megatron_fdd.data.provider import build_datasets
from megatron_fdd.data.store.coverage import Source, Unit
from megatron_fdd.data.store.origin import cuts_rows, identity_of_data, whereabouts
from megatron_fdd.data.store.unit import units_of
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import megatron_args, sets

__all__ = ["sets"]  # the fixture

PACKED = "--dataloader-inter-document-masking"
KINDS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "rows": ("text", (), False),
    "rows with documents kept apart": ("text", (PACKED,), False),
    "pieces": ("text", (PACKED,), True),
    "instructions": ("instruction", (), False),
    "packed instructions": ("instruction", (PACKED,), False),
}


def built(sets: Path, hf: TokenizerSettings, kind: str, *more: str, paths: int = 1) -> tuple[str, list[Any]]:
    name, flags, is_cut = KINDS[kind]
    prefix = str(sets / name)
    args = megatron_args(
        *("--data-path", *[prefix] * paths, "--split", "80,20,0", "--seq-length", "24", *flags, *more)
    )
    args.fdd_text_units = "documents" if is_cut else "rows"
    args.data_cache_path = str(sets / "cache")
    return prefix, build_datasets(args, (8, 4, 0), load_tokenizer(hf))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("paths", [1, 2])
def test_a_unit_is_named_by_its_document(sets: Path, hf: TokenizerSettings, kind: str, paths: int) -> None:
    prefix, (train, valid, _) = built(sets, hf, kind, paths=paths)
    documents = IndexedDataset(prefix)
    for name, dataset, looked_at in (
        ("training", train, train),
        ("validation", FilledDataset(valid), valid),
    ):
        for number in range(4):
            sample = looked_at[number]
            for first, last in units_of(sample):
                told = whereabouts(Source(name, dataset, 4), Unit(0, number, first, last))
                place, _, where = told.partition(" (document ")
                assert place == f"{name} sample {number}, tokens {first} to {last - 1}"
                document, _, path = where.partition(" of ")
                assert path == f"{prefix})"
                ids = documents[int(document)].tolist()
                begin = sample["tokens"][first:last].tolist()
                # A row may go on in the next document.
                least = 1 if kind == "rows" else len(begin)
                assert any(
                    begin[: len(ids) - at] == ids[at : at + len(begin)] for at in range(len(ids) - least + 1)
                ), (begin, ids)


def test_data_that_nobody_knows_is_named_by_its_sample() -> None:
    told = whereabouts(Source("training", [{}], 1), Unit(0, 0, 2, 9))
    assert told == "training sample 0, tokens 2 to 8"


def identity(sets: Path, hf: TokenizerSettings, kind: str, *more: str, count: int = 8) -> str | None:
    _, (train, _, _) = built(sets, hf, kind, *more)
    return identity_of_data([Source("training", train, count)])


def test_what_decides_the_units_is_in_the_identity(sets: Path, hf: TokenizerSettings) -> None:
    found = [identity(sets, hf, kind) for kind in KINDS]
    assert found == [identity(sets, hf, kind) for kind in KINDS]
    changed = [
        identity(sets, hf, "rows", "--seed", "5"),
        identity(sets, hf, "rows", "--eod-mask-loss"),
        identity(sets, hf, "rows", count=7),
    ]
    assert None not in found
    assert len({*found, *changed}) == len(found) + len(changed)


def test_files_that_change_are_other_data(sets: Path, hf: TokenizerSettings) -> None:
    prefix, (train, _, _) = built(sets, hf, "pieces")
    before = identity_of_data([Source("training", train, 8)])
    state = os.stat(f"{prefix}.bin")
    os.utime(f"{prefix}.bin", ns=(state.st_atime_ns, state.st_mtime_ns + 1000))
    try:
        assert identity_of_data([Source("training", train, 8)]) != before
    finally:
        os.utime(f"{prefix}.bin", ns=(state.st_atime_ns, state.st_mtime_ns))


def test_other_data_has_no_identity(sets: Path, hf: TokenizerSettings) -> None:
    assert identity_of_data([Source("training", [np.zeros(3)], 1)]) is None


def test_rows_of_text_are_cut_anew(sets: Path, hf: TokenizerSettings) -> None:
    cut = {kind: cuts_rows([Source("training", built(sets, hf, kind)[1][0], 8)]) for kind in KINDS}
    assert [kind for kind, is_cut in cut.items() if is_cut] == list(KINDS)[:2]
