"""The ids of a set: known as a whole, read once, and held to every vocabulary of the run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_fdd.data import token_ids
from megatron_fdd.data.batch import Wait, checked_batches
from megatron_fdd.data.megatron_tokenizer import load_tokenizer
from megatron_fdd.data.prepared import open_set
from megatron_fdd.data.provider import check_data_args
from megatron_fdd.data.sources import open_sets
from megatron_fdd.data.token_ids import TokenRange, check_token_ids, token_range
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import megatron_args


def foreign(prefix: Path, documents: list[list[int]], dtype: type[np.number] = np.int32) -> str:
    """Write a set as Megatron's own tools write it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few ids at a time, as of a large file, and remember every read."""
    monkeypatch.setattr(token_ids, "_CHUNK", 5)
    monkeypatch.setattr(token_ids, "_LONG_S", -1.0)
    token_ids._read.cache_clear()


@pytest.mark.usefixtures("short_reads")
def test_a_set_of_unknown_origin_is_read_to_its_end(tmp_path: Path) -> None:
    prefix = foreign(tmp_path / "own", [[3, 4, 9] * 7, [5, 505, -7], [6]])
    assert token_range(open_set(prefix), str(tmp_path)) == TokenRange(-7, 505)
    assert token_range(open_set(foreign(tmp_path / "none", [])), str(tmp_path)) == TokenRange(0, -1)


@pytest.mark.usefixtures("short_reads")
def test_it_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    prefix = foreign(tmp_path / "own", [[3, 4, 9] * 7])
    assert token_range(open_set(prefix), str(cache)) == TokenRange(3, 9)
    (kept,) = cache.iterdir()
    token_ids._read.cache_clear()
    monkeypatch.setattr(token_ids, "_mapped", lambda *_: pytest.fail("read again"))
    assert token_range(open_set(prefix), str(cache)) == TokenRange(3, 9)
    monkeypatch.undo()
    token_ids._read.cache_clear()
    for wrong in ("[]", "{", json.dumps({"source": 1})):
        kept.write_text(wrong)
        assert token_range(open_set(prefix), str(cache)) == TokenRange(3, 9)
        token_ids._read.cache_clear()


@pytest.mark.usefixtures("short_reads")
def test_another_file_at_the_same_place_is_read_again(tmp_path: Path) -> None:
    for number, largest in enumerate((9, 700)):
        prefix = foreign(tmp_path / "own", [[3, largest]])
        os.utime(prefix + ".bin", ns=(number, number))
        assert token_range(open_set(prefix), str(tmp_path / "cache")).largest == largest


@pytest.mark.usefixtures("short_reads")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    prefix = foreign(tmp_path / "own", [[3, 9]])
    assert token_range(open_set(prefix), str(tmp_path / "file" / "below")).largest == 9


@pytest.mark.usefixtures("short_reads")
def test_a_long_read_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(token_ids, "_SAY_EVERY_S", -1.0)
    token_range(open_set(foreign(tmp_path / "own", [[3] * 10])), str(tmp_path))
    assert "own.bin: looking once for its smallest and largest token id, 50% done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [1, 2, 500],
            r"own has the token id 500, and the teacher has 500 ids \(0 to 499\); prepare the data",
        ),
        ([1, -7, 2], "own has the token id -7, and ids begin with 0"),
    ],
)
def test_ids_that_one_holder_lacks_are_refused(ids: list[int], message: str, tmp_path: Path) -> None:
    args = megatron_args("--data-path", foreign(tmp_path / "own", [ids]))
    with pytest.raises(ValueError, match=message):
        check_token_ids(args, open_sets(args), {"the student": 502, "the teacher": 500})
    args = megatron_args("--data-path", foreign(tmp_path / "right", [[0, 499]]))
    check_token_ids(args, open_sets(args), {"the student": 502, "the teacher": 500})


def test_a_run_asks_its_tokenizer(hf: TokenizerSettings, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hf)
    prefix = foreign(tmp_path / "own", [[1] * 30, [2, tokenizer.vocab_size]])
    args = megatron_args("--data-path", prefix, "--split", "1,0,0", "--eval-iters", "0")
    with pytest.raises(ValueError, match=f"the tokenizer of this run has {tokenizer.vocab_size} ids"):
        check_data_args(args, tokenizer)


@pytest.mark.parametrize("at", [0, 1, -1])
def test_a_file_that_is_not_as_prepared_is_refused(
    at: int, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its ends and in the middle, where a large file is only sampled."""
    for end in (".bin", ".idx", ".prepared.json"):
        (tmp_path / f"text{end}").write_bytes((sets / f"text{end}").read_bytes())
    prepared = open_set(str(tmp_path / "text"))
    monkeypatch.setattr(token_ids, "_SAMPLED_IDS", 100)
    monkeypatch.setattr(token_ids, "_PIECES", 4)
    stored = token_range(prepared, str(tmp_path))
    assert prepared.info is not None
    assert stored == TokenRange(prepared.info.smallest_token_id, prepared.info.largest_token_id)
    ids = np.memmap(tmp_path / "text.bin", prepared.dtype, mode="r+")
    pieces = np.linspace(0, len(ids) - 25, 4).astype(int)
    ids[at if at != 1 else pieces[1]] = 60000
    ids.flush()
    with pytest.raises(ValueError, match=r"text.bin has the token id 60000, and .*text.prepared.json says"):
        token_range(prepared, str(tmp_path))


def batch(token: int = 1, label: int = 1, masked_label: int = 1) -> dict[str, torch.Tensor]:
    return {
        "tokens": torch.tensor([[1, token]]),
        "labels": torch.tensor([[label, masked_label]]),
        "loss_mask": torch.tensor([[1.0, 0.0]]),
        "token_mask": torch.tensor([[1.0, 1.0]]),
        "position_ids": torch.tensor([[0, 1]]),
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token": 5}, "iteration 3: a batch has the token 5, .* share the ids 0 to 4"),
        ({"token": -1}, "the token -1"),
        ({"label": 5}, "the label 5"),
        ({"label": -100}, "the label -100"),
    ],
)
def test_every_batch_is_held_to_the_vocabulary(wrong: dict[str, int], message: str) -> None:
    whole = [batch(4, 0, masked_label=-100), batch(0, 4, masked_label=77)]
    several = checked_batches([iter([*whole, batch(**wrong)]), iter(whole)], 5, 2, Wait())
    assert [next(several[1]) for _ in whole] == whole
    with pytest.raises(StopIteration):
        next(several[1])
    assert [next(several[0]) for _ in whole] == whole
    with pytest.raises(ValueError, match=message):
        next(several[0])


def test_a_batch_without_a_label_passes() -> None:
    empty = {name: torch.zeros(1, 2) for name in batch()}
    assert next(checked_batches(iter([empty]), 5, 0, Wait())) is empty


def test_an_entry_that_is_missing_is_named() -> None:
    lacks = batch()
    del lacks["token_mask"]
    with pytest.raises(
        ValueError, match="no token_mask; give each of tokens, labels, position_ids, loss_mask, token"
    ):
        next(checked_batches(iter([lacks]), 5, 0, Wait()))
