"""The ids of a set: known as a whole, read once, and held to every vocabulary of the run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fdd.data import token_ids
from megatron_fdd.data.batch import Wait, checked_batches
from megatron_fdd.data.megatron_tokenizer import load_tokenizer
from megatron_fdd.data.prepared import open_set
from megatron_fdd.data.provider import check_data_args
from megatron_fdd.data.sources import open_sets
from megatron_fdd.data.token_ids import (
    TokenRange,
    check_all_token_ids,
    check_token_ids,
    token_range,
    unread_sets,
)
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import megatron_args
from tests.data.foreign import foreign, forget
from tests.harness.ranks import distributed

SHORT = {"_CHUNK": 5, "SAMPLED_IDS": 6, "_PIECES": 3}


@pytest.fixture
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few ids at a time, as of a large file."""
    for name, value in SHORT.items():
        monkeypatch.setattr(token_ids, name, value)
    forget()


def source(prefix: str) -> token_ids._Source:
    return token_ids._Source.of(open_set(prefix))


@pytest.mark.usefixtures("short_reads")
def test_a_set_of_unknown_origin_is_sampled_alone(tmp_path: Path) -> None:
    """Its ends and its middle; a short one is read whole."""
    long = [[3, 4, 9] * 4, [-7, 505], [8] * 7]
    assert token_range(open_set(foreign(tmp_path / "own", long)), str(tmp_path)) == TokenRange(3, 8)
    assert token_range(open_set(foreign(tmp_path / "short", [[5, 505, -7]])), str(tmp_path)) == TokenRange(
        -7, 505
    )
    assert token_range(open_set(foreign(tmp_path / "none", [])), str(tmp_path)) == TokenRange(0, -1)
    args = megatron_args("--data-path", str(tmp_path / "own"), str(tmp_path / "short"))
    assert unread_sets(args, open_sets(args)) == [str(tmp_path / "own")]


@pytest.mark.usefixtures("short_reads")
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 50])
def test_ranks_together_read_every_id_once(
    num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"own": [[3, 4, 9] * 7, [5, 505, -7], [6]], "none": [], "other": [[1] * 12, [2, 4]]}
    sources = [source(foreign(tmp_path / name, documents)) for name, documents in sets.items()]
    read: list[list[tuple[str, int]]] = []

    def noted(path: str, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
        first = offset // dtype.itemsize
        read[-1] += [(path, number) for number in range(first, first + count)]
        return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))

    monkeypatch.setattr(token_ids, "mapped_numbers", noted)
    shares = []
    for rank in range(num_ranks):
        read.append([])
        shares.append(token_ids._read_share(sources, rank, num_ranks))
    whole = [token_ids._joined(each) for each in zip(*shares, strict=True)]
    assert whole == [TokenRange(-7, 505), TokenRange(0, -1), TokenRange(1, 4)]
    everything = sorted(each for share in read for each in share)
    assert everything == sorted((each.path, number) for each in sources for number in range(each.num_ids))
    sizes = [len(share) for share in read]
    assert (
        max(sizes) - min(sizes) <= 2 * 5
    )  # a piece more or less, of which the last ones of a file are short


@pytest.mark.usefixtures("short_reads")
def test_what_was_read_is_kept(tmp_path: Path) -> None:
    prefix, cache = foreign(tmp_path / "own", [[3, 4, 9] * 7]), tmp_path / "cache"
    args = megatron_args("--data-path", prefix, "--data-cache-path", str(cache))
    assert unread_sets(args, open_sets(args)) == [prefix]
    token_ids._keep(str(cache), source(prefix), TokenRange(2, 11))
    (kept,) = cache.iterdir()
    forget()
    assert unread_sets(args, open_sets(args)) == []
    assert token_range(open_set(prefix), str(cache)) == TokenRange(2, 11)
    for wrong in ("[]", "{", json.dumps({"source": 1})):
        forget()
        kept.write_text(wrong)
        assert unread_sets(args, open_sets(args)) == [prefix]
        assert token_range(open_set(prefix), str(cache)) == TokenRange(3, 9)


@pytest.mark.usefixtures("short_reads")
def test_another_file_at_the_same_place_is_read_again(tmp_path: Path) -> None:
    for number, largest in enumerate((9, 700)):
        prefix = foreign(tmp_path / "own", [[3, largest] * 10])
        os.utime(prefix + ".bin", ns=(number, number))
        args = megatron_args("--data-path", prefix, "--data-cache-path", str(tmp_path / "cache"))
        assert unread_sets(args, open_sets(args)) == [prefix]
        token_ids._keep(str(tmp_path / "cache"), source(prefix), TokenRange(3, largest))
        forget()
        assert token_range(open_set(prefix), str(tmp_path / "cache")).largest == largest


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    prefix = foreign(tmp_path / "own", [[3, 9]])
    token_ids._keep(str(tmp_path / "file" / "below"), source(prefix), TokenRange(3, 9))
    assert token_range(open_set(prefix), str(tmp_path / "file" / "below")).largest == 9


@pytest.mark.usefixtures("short_reads")
def test_a_long_read_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(token_ids, "_SAY_EVERY_S", -1.0)
    token_ids._read_share([source(foreign(tmp_path / "own", [[3] * 10]))], 0, 1)
    said = capsys.readouterr().out
    assert "own.bin: looking once for its smallest and largest token id, 50% of rank 0's share" in said


@distributed(ranks=2)
def test_every_rank_refuses_what_one_has_found(tmp_path: Path) -> None:
    """The id 500 is in the share of the second rank, and no sample holds it."""
    with patch.multiple(token_ids, **SHORT):
        forget()
        is_first = dist.get_rank() == 0
        if is_first:
            foreign(tmp_path / "own", [[1, 2, 3] * 8, [500], [4] * 8])
            foreign(tmp_path / "right", [[1, 2, 3] * 8])
        dist.barrier()
        flags = [
            "--data-path",
            str(tmp_path / "right"),
            str(tmp_path / "own"),
            "--data-cache-path",
            str(tmp_path),
        ]
        args = megatron_args(*flags)
        check_token_ids(args, open_sets(args), {"the student": 500})
        with pytest.raises(ValueError, match="own has the token id 500, and the student has 500 ids"):
            check_all_token_ids(args, {"the student": 500})
        dist.barrier()
        forget()
        assert unread_sets(args, open_sets(args)) == [], "the next run knows at once"
        with pytest.raises(ValueError, match="own has the token id 500, and the student has 500 ids"):
            check_token_ids(args, open_sets(args), {"the student": 500})
        check_all_token_ids(args, {"the student": 500})
        if not is_first:  # a node that does not see what is kept reads nothing either
            args.data_cache_path = str(tmp_path / "elsewhere")
        check_all_token_ids(args, {"the student": 500})


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
    monkeypatch.setattr(token_ids, "SAMPLED_IDS", 100)
    monkeypatch.setattr(token_ids, "_PIECES", 4)
    stored = token_range(prepared, str(tmp_path))
    assert prepared.info is not None
    assert stored == TokenRange(prepared.info.smallest_token_id, prepared.info.largest_token_id)
    ids = np.memmap(tmp_path / "text.bin", prepared.dtype, mode="r+")
    pieces = np.linspace(0, len(ids) - 25, 4).astype(int)
    ids[at if at != 1 else pieces[1]] = 60000
    ids.flush()
    forget()  # it may be the same instant for the file system
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
    several = checked_batches([iter([*whole, batch(**wrong)]), iter(whole)], 5, 2, 2, Wait())
    assert [next(several[1]) for _ in whole] == whole
    with pytest.raises(ValueError, match="iteration 3: the data have no batch left on this rank"):
        next(several[1])
    assert [next(several[0]) for _ in whole] == whole
    with pytest.raises(ValueError, match=message):
        next(several[0])


@pytest.mark.parametrize("position", [-1, 2, 2**40])
def test_a_position_beyond_the_sample_is_named(position: int) -> None:
    good = batch()["position_ids"]
    samples = {name: torch.cat((entry, entry)) for name, entry in batch().items()}
    samples["position_ids"] = torch.cat((good, torch.tensor([[0, position]])))
    message = (
        f"iteration 4: sample 1 of a batch has the position {position} in position_ids, and .* leaves 0 to 1;"
    )
    with pytest.raises(ValueError, match=message):
        next(checked_batches(iter([samples]), 5, 2, 3, Wait()))


def test_a_batch_without_a_label_passes() -> None:
    empty = {name: torch.zeros_like(entry) for name, entry in batch().items()}
    assert next(checked_batches(iter([empty]), 5, 2, 0, Wait())) is empty


def test_an_entry_that_is_missing_is_named() -> None:
    lacks = batch()
    del lacks["token_mask"]
    with pytest.raises(
        ValueError, match="no token_mask; give each of tokens, labels, position_ids, loss_mask, token"
    ):
        next(checked_batches(iter([lacks]), 5, 2, 0, Wait()))


@pytest.mark.parametrize("name", list(batch()))
def test_an_entry_of_another_length_is_named(name: str) -> None:
    other = {**batch(), name: torch.ones(1, 3, dtype=torch.int64)}
    with pytest.raises(
        ValueError, match=rf"iteration 4: {name} of a batch is \[1, 3\], and --seq-length is 2"
    ):
        next(checked_batches(iter([other]), 5, 2, 3, Wait()))


@pytest.mark.parametrize("name", list(batch()))
def test_an_entry_with_a_dimension_more_or_other_samples_is_named(name: str) -> None:
    entry = batch()[name]
    for wrong in (entry[None], entry[0], torch.cat((entry, entry))):
        other = batch() | {name: wrong}
        with pytest.raises(ValueError, match=r"of a batch is \[.*each entry must be \[samples, 2\]"):
            next(checked_batches(iter([other]), 5, 2, 3, Wait()))


@pytest.mark.parametrize("name", ["tokens", "labels", "position_ids"])
def test_ids_that_are_no_whole_numbers_are_named(name: str) -> None:
    other = batch() | {name: batch()[name].float()}
    with pytest.raises(ValueError, match=rf"iteration 4: {name} of a batch is torch.float32; give whole"):
        next(checked_batches(iter([other]), 5, 2, 3, Wait()))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["loss_mask", "token_mask"])
def test_a_mask_that_is_no_weight_is_named(name: str, value: float) -> None:
    other = batch() | {name: torch.tensor([[1.0, value]])}
    with pytest.raises(ValueError, match=rf"iteration 4: {name} of a batch has the value {value:g}; give 1"):
        next(checked_batches(iter([other]), 5, 2, 3, Wait()))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
def test_masks_of_other_kinds_pass(kind: torch.dtype) -> None:
    other = batch() | {name: batch()[name].to(kind) for name in ("loss_mask", "token_mask")}
    assert next(checked_batches(iter([other]), 5, 2, 3, Wait())) is other
