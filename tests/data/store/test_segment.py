"""What is written is read: whole units and ranges of them, from ordinary safetensors files."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_fdd.data.store import segment_file
from megatron_fdd.data.store.segment import SegmentWriter, read_layout, segment_names
from megatron_fdd.data.store.store import Store, Wanted
from tests.data.store.made import (
    IDENTITY,
    P,
    T,
    assert_holds,
    file_of,
    flip,
    opened,
    unit,
    write,
)

LENGTHS = (1, 63, 64, 65, 129)


@pytest.mark.parametrize(("at_once", "most_parts"), [(1 << 20, 512), (1, 512), (130 * P, 2), (1 << 20, 1)])
def test_ranges_of_units_are_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, most_parts: int
) -> None:
    """Units that end before, at and behind the tokens of a sum; every block, in any order, any range."""
    monkeypatch.setattr(segment_file, "AT_ONCE", at_once)
    monkeypatch.setattr(segment_file, "_MOST_PARTS", most_parts)
    units = [unit(length) for length in LENGTHS]
    write(tmp_path, units[:3], units[3:])
    store = opened(tmp_path)
    assert_holds(store, units)
    random = np.random.default_rng(5)
    for ids, states in units * 40:
        first, last = np.sort(random.choice(len(ids) + 1, 2, replace=False)).tolist()
        blocks = random.permutation(T)[: random.integers(1, T + 1)].tolist()
        np.testing.assert_array_equal(store.read(ids, blocks, first, last), states[blocks, first:last])


def test_a_segment_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    units = [unit(3), unit(70)]
    (name,) = write(tmp_path, units)
    tensors = load_file(file_of(tmp_path, name))
    assert {key: (value.dtype.str, value.shape) for key, value in tensors.items()} == {
        "keys": ("|u1", (2, 16)),
        "lengths": ("<i8", (2,)),
        "ids": ("<i4", (73,)),
        "states": ("|u1", (73 * T * P,)),
        "sums": ("<u8", (T * 3,)),
    }
    np.testing.assert_array_equal(tensors["ids"], np.concatenate([ids for ids, _ in units]))
    np.testing.assert_array_equal(
        tensors["states"], np.concatenate([states.reshape(-1) for _, states in units])
    )


def test_the_same_units_make_the_same_file(tmp_path: Path) -> None:
    units = [unit(5), unit(9)]
    (name,) = write(tmp_path / "a", units)
    (again,) = write(tmp_path / "b", units)
    assert file_of(tmp_path / "a", name).read_bytes() == file_of(tmp_path / "b", again).read_bytes()
    assert write(tmp_path / "b", units) == []


def test_states_with_gaps_in_memory_are_written_right(tmp_path: Path) -> None:
    ids, states = unit(20)
    twice = np.repeat(states, 2, axis=1)
    write(tmp_path, [(ids, twice[:, ::2])])
    assert_holds(opened(tmp_path), [(ids, states)])


@pytest.mark.parametrize("most", [{"most_units": 3}, {"most_bytes": 3 * 4 * T * P}])
def test_a_segment_is_written_when_enough_is_there(tmp_path: Path, most: dict[str, int]) -> None:
    units = [unit(4, seed) for seed in range(7)]
    write(tmp_path)
    writer = SegmentWriter(tmp_path, IDENTITY.digest, T, P, **most)
    for number, (ids, states) in enumerate(units, start=1):
        writer.add(ids, states)
        assert len(list(segment_names(tmp_path))) == number // 3
    writer.flush()
    writer.flush()
    assert len(list(segment_names(tmp_path))) == 3
    assert_holds(opened(tmp_path), units)


def test_other_files_are_no_segments(tmp_path: Path) -> None:
    (name,) = write(tmp_path, [unit(4)])
    folder = file_of(tmp_path, name).parent
    for other in ("copy.safetensors", f"{name} (1).safetensors", f".{name}.safetensors", f"{name}.tmp"):
        (folder / other).write_bytes(b"x")
    other_folder = tmp_path / "segments" / ("00" if name[:2] != "00" else "01")
    other_folder.mkdir()
    (other_folder / f"{name}.safetensors").write_bytes(b"x")
    (tmp_path / "segments" / "notes.txt").write_text("x")
    assert list(segment_names(tmp_path)) == [name]
    assert_holds(opened(tmp_path), [unit(4)])


def test_a_unit_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [unit(4)])
    with pytest.raises(ValueError, match=r"has no unit of the 4 tokens \[.*run fdd teach"):
        opened(tmp_path).read(unit(4, 1)[0], [0], 0, 4)


def _read_together(store: Store) -> list[np.ndarray]:
    """Read the first block of units of each length by one call, as a micro-batch."""
    rows = [np.empty((length, P), np.uint8) for length in LENGTHS]
    store.read_into(
        [0],
        [
            Wanted(unit(length)[0], [(0, length, [memoryview(row.reshape(-1))])])
            for length, row in zip(LENGTHS, rows, strict=True)
        ],
    )
    return rows


def test_units_of_a_micro_batch_are_read_by_several_threads(tmp_path: Path) -> None:
    write(tmp_path, [unit(length) for length in LENGTHS])
    for length, row in zip(LENGTHS, _read_together(opened(tmp_path)), strict=True):
        np.testing.assert_array_equal(row, unit(length)[1][0])


@pytest.mark.parametrize("damaged", range(len(LENGTHS)))
def test_damage_that_any_thread_finds_is_raised(tmp_path: Path, damaged: int) -> None:
    names = write(tmp_path, *([unit(length)] for length in LENGTHS))
    store = opened(tmp_path)
    flip(
        file_of(tmp_path, names[damaged]),
        read_layout(file_of(tmp_path, names[damaged]), IDENTITY.digest).states[0],
    )
    with pytest.raises(ValueError, match=f"{names[damaged]}.safetensors: has other bytes than were written"):
        _read_together(store)


def test_a_forked_process_reads_with_threads_of_its_own(tmp_path: Path) -> None:
    """Those of its parent do not come along: it would wait for them for ever."""
    write(tmp_path, [unit(length) for length in LENGTHS])
    store = opened(tmp_path)
    _read_together(store)
    child = os.fork()
    if not child:
        signal.alarm(20)
        _read_together(store)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
