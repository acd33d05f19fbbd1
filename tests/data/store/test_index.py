"""The index: its cache saves reading, and is never believed when it is wrong."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from megatron_fdd.data.store import index as index_module
from megatron_fdd.data.store.index import INDEX_FILE, Index
from megatron_fdd.data.store.unit import unit_key
from tests.data.store.made import OTHER, assert_holds, file_of, flip, opened, unit, write


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The segments whose headers were read."""
    found: list[str] = []
    read = index_module.read_layout

    def read_layout(path: Path, digest: str) -> object:
        found.append(path.stem)
        return read(path, digest)

    monkeypatch.setattr(index_module, "read_layout", read_layout)
    return found


UNITS = [unit(length, seed) for seed in range(3) for length in (1, 64, 70)]


def test_a_cache_saves_every_header(tmp_path: Path, headers: list[str]) -> None:
    names = write(tmp_path, UNITS[:4], UNITS[4:])
    opened(tmp_path).save_index()
    assert sorted(headers) == sorted(names)
    headers.clear()
    store = opened(tmp_path)
    assert headers == []
    assert (len(store.index), store.index.num_tokens) == (9, 3 * 135)
    assert_holds(store, UNITS)


def test_segments_that_came_and_went_since(tmp_path: Path, headers: list[str]) -> None:
    gone, kept = write(tmp_path, UNITS[:2], UNITS[2:4])
    opened(tmp_path).save_index()
    file_of(tmp_path, gone).unlink()
    new = write(tmp_path, UNITS[4:6], UNITS[6:])
    headers.clear()
    store = opened(tmp_path)
    assert sorted(headers) == sorted(new)
    assert store.index.names == sorted([kept, *new])
    assert_holds(store, UNITS[2:])
    assert store.index.has([unit_key(ids) for ids, _ in UNITS]).tolist() == [False] * 2 + [True] * 7


def test_a_unit_of_two_segments_stays_when_one_goes(tmp_path: Path) -> None:
    """The cache names one segment of it, and that one is removed."""
    names = write(tmp_path, UNITS[:2], UNITS[1:3])
    store = opened(tmp_path)
    assert len(store.index) == 3
    store.save_index()
    for name in names:
        content = file_of(tmp_path, name).read_bytes()
        file_of(tmp_path, name).unlink()
        units = UNITS[1:3] if name == names[0] else UNITS[:2]
        store = opened(tmp_path)
        assert len(store.index) == 2
        assert_holds(store, units)
        file_of(tmp_path, name).write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [_cut, _empty, _zeros, Path.unlink])
def test_a_damaged_cache_counts_as_none(tmp_path: Path, headers: list[str], damage: object) -> None:
    names = write(tmp_path, UNITS[:4], UNITS[4:])
    opened(tmp_path).save_index()
    headers.clear()
    damage(tmp_path / INDEX_FILE)  # type: ignore[operator]
    assert_holds(opened(tmp_path), UNITS)
    assert sorted(headers) == sorted(names)


def test_no_flipped_bit_of_a_cache_changes_what_is_read(tmp_path: Path) -> None:
    write(tmp_path, UNITS[:4], UNITS[4:])
    opened(tmp_path).save_index()
    path = tmp_path / INDEX_FILE
    right = path.read_bytes()
    for at in range(0, len(right), 7):
        flip(path, at, at % 8)
        assert_holds(opened(tmp_path), UNITS)
        path.write_bytes(right)


def test_the_cache_of_another_store_is_not_used(tmp_path: Path, headers: list[str]) -> None:
    write(tmp_path / "a", UNITS)
    write(tmp_path / "b", [(ids, states[::-1].copy()) for ids, states in UNITS], identity=OTHER)
    opened(tmp_path / "b").save_index()
    (tmp_path / "b" / INDEX_FILE).rename(tmp_path / "a" / INDEX_FILE)
    headers.clear()
    assert_holds(opened(tmp_path / "a"), UNITS)
    assert len(headers) == 1


def test_an_empty_store_has_an_index(tmp_path: Path) -> None:
    write(tmp_path)
    store = opened(tmp_path)
    store.save_index()
    for each in (store, opened(tmp_path)):
        assert len(each.index) == 0
        assert each.index.has([b"0" * 16]).tolist() == [False]
        assert each.index.has([]).tolist() == []
        assert each.index.find(b"0" * 16) is None


def test_keys_with_the_same_first_half() -> None:
    halves = [(7, 1), (7, 5), (7, 9), (2**64 - 1, 3)]
    records = np.zeros(len(halves), index_module._RECORD)
    records["high"], records["low"] = np.array(halves, np.uint64).T
    records["start"] = range(len(halves))
    index = Index(["00" * 16], np.zeros((1, 5), np.int64), records)
    keys = [high.to_bytes(8, "big") + low.to_bytes(8, "big") for high, low in halves]
    for number, key in enumerate(keys):
        place = index.find(key)
        assert place is not None
        assert place.start == number
    absent = [(7).to_bytes(8, "big") + low.to_bytes(8, "big") for low in (0, 2, 10)] + [b"\xff" * 16]
    assert index.has([*keys, *absent]).tolist() == [True] * 4 + [False] * 4
    assert [index.find(key) for key in absent] == [None] * 4


def test_a_segment_that_goes_while_the_store_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed, and then pruned by another process."""
    names = write(tmp_path, UNITS[:4], UNITS[4:])
    listed = list(index_module.segment_names(tmp_path))
    monkeypatch.setattr(index_module, "segment_names", lambda _: iter(listed))
    file_of(tmp_path, names[0]).unlink()
    with pytest.raises(ValueError, match=rf"{names[0]}.*is gone; .*fdd teach"):
        opened(tmp_path)


def test_an_index_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, UNITS[:4])
    opened(tmp_path).save_index()
    before = (tmp_path / INDEX_FILE).read_bytes()
    write(tmp_path, UNITS[4:])
    store = opened(tmp_path)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(monkeypatch.context())
        patch.setattr("os.fsync", _full)
        with pytest.raises(ValueError, match="No space left on device .*make room there"):
            store.save_index()
    assert (tmp_path / INDEX_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.glob(".*")] == []


def _full(_: int) -> None:
    raise OSError(28, "No space left on device")
