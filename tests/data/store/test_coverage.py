"""The units of a run: counted by one process or by several, compared with a store, and kept for the next start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_fdd.data.datasets import Sample
from megatron_fdd.data.store import coverage
from megatron_fdd.data.store.counted import Counted, _path, _read, keep
from megatron_fdd.data.store.coverage import (
    RunUnits,
    Source,
    Unit,
    count_share,
    joined,
    places_of,
    read_ids,
)
from megatron_fdd.data.store.unit import unit_key
from tests.data.store.made import flip, opened, unit, write

LENGTHS = (3, 5, 3, 9, 5, 7, 3)  # some units come again
RUN = "ab" * 16


def sample(length: int) -> Sample:
    ids, _ = unit(length)
    mask = torch.ones(length)
    return {"tokens": torch.from_numpy(ids.astype(np.int64)), "loss_mask": mask, "token_mask": mask}


def sources(lengths: tuple[int, ...] = LENGTHS) -> list[Source]:
    return [Source("training", [sample(each) for each in lengths], len(lengths))]


def places(table: coverage.Table) -> list[tuple[int, int]]:
    return [(each.sample, each.last) for each in places_of(table)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 9])
@pytest.mark.parametrize("gathered", [1, 2, 1 << 16])
def test_several_ranks_find_what_one_finds(
    num_ranks: int, gathered: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "_GATHERED", gathered)
    write(tmp_path, [unit(5)])
    shares = [count_share(sources(), deal=(rank, num_ranks)) for rank in range(num_ranks)]
    found = joined(shares)
    assert places(found.table) == [(0, 3), (1, 5), (3, 9), (5, 7)]
    assert places(found.missing(opened(tmp_path).index)) == [(0, 3), (3, 9), (5, 7)]
    assert (found.num_read, found.tokens_read) == (7, sum(LENGTHS))
    keys = [
        int(each["high"]).to_bytes(8, "big") + int(each["low"]).to_bytes(8, "big") for each in found.table
    ]
    assert keys == [unit_key(unit(length)[0]) for length in (3, 5, 9, 7)]


def test_a_unit_takes_36_bytes() -> None:
    assert count_share(sources()).table.nbytes == 4 * 36


def test_stores_that_grew_differ(tmp_path: Path) -> None:
    write(tmp_path, [unit(5)])
    before = opened(tmp_path).index.digest
    assert opened(tmp_path).index.digest == before
    write(tmp_path, [unit(6)])
    assert opened(tmp_path).index.digest != before


def test_nothing_to_read_has_no_unit() -> None:
    assert len(joined([count_share([])]).table) == 0


def kept(store: Path, lengths: tuple[int, ...] = LENGTHS, run: str = RUN) -> RunUnits:
    units = count_share(sources(lengths))
    keep(store, Counted(units, run, is_kept=False))
    return units


def test_a_count_is_kept_for_the_same_data_alone(tmp_path: Path) -> None:
    write(tmp_path)
    units = kept(tmp_path)
    again = _read(tmp_path, RUN)
    assert again is not None
    assert np.array_equal(again.table, units.table)
    assert (again.num_read, again.tokens_read) == (units.num_read, units.tokens_read)
    assert _read(tmp_path, "cd" * 16) is None
    _path(tmp_path, RUN).rename(_path(tmp_path, "cd" * 16))  # under another name
    assert _read(tmp_path, "cd" * 16) is None


@pytest.mark.parametrize("at", [0, 9, 40, 200, -1, -36, None])
def test_a_damaged_count_is_made_again(tmp_path: Path, at: int | None) -> None:
    write(tmp_path)
    units, path = kept(tmp_path), _path(tmp_path, RUN)
    if at is None:
        path.write_bytes(path.read_bytes()[:-5])
    else:
        flip(path, at)
    assert _read(tmp_path, RUN) is None
    kept(tmp_path)
    again = _read(tmp_path, RUN)
    assert again is not None
    assert np.array_equal(again.table, units.table)


def test_a_count_that_cannot_be_kept_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path)  # no store
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)
    (tmp_path / "runs").write_text("in the way")
    kept(tmp_path)
    assert _read(tmp_path, RUN) is None


def test_a_sample_with_several_units_is_read_once() -> None:
    read: list[int] = []

    class Samples(list[Sample]):
        def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
            read.append(index)
            return super().__getitem__(index)

    source = Source("training", Samples([sample(9), sample(7)]), 2)
    units = [Unit(0, 1, 0, 3), Unit(0, 0, 2, 9), Unit(0, 1, 3, 7)]
    found = read_ids([source], units)
    assert read == [1, 0]
    for ids, wanted in zip(found, (unit(7)[0][:3], unit(9)[0][2:], unit(7)[0][3:]), strict=True):
        np.testing.assert_array_equal(ids, wanted)
