"""Check, prune and describe."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fdd.cli.store import command
from megatron_fdd.data.store import lens, upkeep
from megatron_fdd.data.store.identity import RUNS
from megatron_fdd.data.store.index import INDEX_FILE
from megatron_fdd.data.store.lens import LENS_FILE
from megatron_fdd.data.store.segment import segment_names
from tests.data.store.made import Unit, assert_holds, file_of, flip, opened, unit, write, write_lens
from tests.hostile.store_kills import started

UNITS = [unit(length, 7) for length in (1, 64, 65, 3)]


def some(places: str) -> list[Unit]:
    return [UNITS[int(place)] for place in places]


def test_a_sound_store_is_counted(tmp_path: Path) -> None:
    names = write(tmp_path, UNITS[:2], UNITS[2:])
    write_lens(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    seen: list[int] = []
    checked = upkeep.check_store(tmp_path, lambda: seen.append(1))
    assert checked.beside is None
    sizes = sum(file_of(tmp_path, name).stat().st_size for name in names)
    assert (checked.num_segments, checked.num_units, checked.num_bytes, checked.damaged) == (2, 4, sizes, {})
    assert len(seen) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_each_damaged_segment_is_found_and_only_those_are_removed(tmp_path: Path) -> None:
    names = write(tmp_path, *([each] for each in UNITS))
    for name in (names[0], names[2]):
        flip(file_of(tmp_path, name), -20)
    checked = upkeep.check_store(tmp_path)
    assert set(checked.damaged) == {names[0], names[2]}
    assert all(name in message for name, message in checked.damaged.items())
    assert (checked.num_segments, checked.num_units) == (4, 2)
    upkeep.remove_damaged(tmp_path, checked)
    assert set(segment_names(tmp_path)) == {names[1], names[3]}
    assert (tmp_path / INDEX_FILE).is_file()
    assert_holds(opened(tmp_path), some("13"))


def test_a_sound_segment_under_another_name_is_not_removed(tmp_path: Path) -> None:
    names = write(tmp_path, UNITS[:2], UNITS[2:])
    flip(file_of(tmp_path, names[0]), -20)
    other = "0" * 32
    moved = file_of(tmp_path, other)
    moved.parent.mkdir(exist_ok=True)
    file_of(tmp_path, names[1]).rename(moved)
    checked = upkeep.check_store(tmp_path)
    assert (set(checked.damaged), set(checked.foreign)) == ({names[0]}, {other})
    assert f"rename it to {file_of(tmp_path, names[1])}" in checked.foreign[other]
    upkeep.remove_damaged(tmp_path, checked)
    assert set(segment_names(tmp_path)) == {other}


def test_what_the_system_does_not_give_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of a disk or of a network is no damage: the segment and the lens may be sound."""
    names = write(tmp_path, UNITS[:2], UNITS[2:])
    write_lens(tmp_path)
    real = Path.open

    def failing(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.stem == names[0]:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *arguments, **more)

    def no_lens(path: Path, **_: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        checked = upkeep.check_store(tmp_path)
    assert (set(checked.unread), checked.damaged, checked.num_units) == ({names[0]}, {}, 2)
    upkeep.remove_damaged(tmp_path, checked)
    assert set(segment_names(tmp_path)) == set(names)
    with monkeypatch.context() as patch:
        patch.setattr(lens, "safe_open", no_lens)
        with pytest.raises(ValueError, match="Stale file handle"):
            lens.lacks_lens(tmp_path)
    assert not lens.lacks_lens(tmp_path)
    flip(tmp_path / LENS_FILE, -1)
    assert lens.lacks_lens(tmp_path)
    assert not (tmp_path / LENS_FILE).exists()


def test_a_link_that_leads_nowhere_is_found_and_not_removed(tmp_path: Path) -> None:
    """Its disk may come back."""
    names = write(tmp_path, UNITS[:2], UNITS[2:])
    link = file_of(tmp_path, names[0])
    link.unlink()
    link.symlink_to("gone")
    checked = upkeep.check_store(tmp_path)
    assert (checked.num_segments, checked.num_units, {*checked.unread}) == (2, 2, {names[0]})
    upkeep.remove_damaged(tmp_path, checked)
    assert link.is_symlink()


def test_a_segment_that_is_pruned_while_it_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(write(tmp_path, UNITS[:2], UNITS[2:]))
    monkeypatch.setattr(upkeep, "segment_entries", lambda _: [(name, True) for name in names])
    file_of(tmp_path, names[1]).unlink()
    checked = upkeep.check_store(tmp_path)
    assert (checked.num_units, checked.damaged, checked.unread) == (2, {}, {})


@pytest.mark.parametrize(
    ("segments", "removed"),
    [
        (["01", "23"], 0),
        (["01", "12", "23"], 1),
        (["0", "01"], 1),
        (["01", "02", "12"], 1),
        (["0", "1", "2", "3", "0123"], None),
        (["01", "12", "20", "3"], 1),
    ],
)
def test_prune_removes_what_is_elsewhere_and_only_that(
    tmp_path: Path, segments: Sequence[str], removed: int | None
) -> None:
    write(tmp_path, *map(some, segments))
    units = some("".join(sorted({*"".join(segments)})))
    size = sum(path.stat().st_size for path in tmp_path.rglob("segments/*/*"))
    count, num_bytes = upkeep.prune(tmp_path)
    assert removed is None or count == removed
    assert (count, num_bytes) == (len(segments) - len(list(segment_names(tmp_path))), num_bytes)
    assert size - num_bytes == sum(path.stat().st_size for path in tmp_path.rglob("segments/*/*"))
    assert_holds(opened(tmp_path), units)
    assert upkeep.prune(tmp_path) == (0, 0)


def test_prune_keeps_the_copy_that_is_right(tmp_path: Path) -> None:
    """Sums are compared before the second copy of a unit goes; nothing goes where one is damaged."""
    names = write(tmp_path, some("01"), some("0"), some("1"), some("23"))
    flip(file_of(tmp_path, names[0]), -20)
    with pytest.raises(ValueError, match=f"{names[0]}.*--remove-damaged"):
        upkeep.prune(tmp_path)
    assert set(segment_names(tmp_path)) == set(names)
    upkeep.remove_damaged(tmp_path, upkeep.check_store(tmp_path))
    assert upkeep.prune(tmp_path) == (0, 0)
    assert_holds(opened(tmp_path), UNITS)


def test_prune_of_a_random_store_is_complete(tmp_path: Path) -> None:
    """No unit is lost, and no segment is left without which nothing would be."""
    random, units = np.random.default_rng(2), [unit(2, seed) for seed in range(12)]
    for _ in range(15):
        chosen = random.permutation(12)[: random.integers(1, 6)].tolist()
        write(tmp_path, [units[each] for each in chosen])
    there = len(opened(tmp_path).index)
    count, _ = upkeep.prune(tmp_path)
    assert count > 0
    assert len(opened(tmp_path).index) == there
    for name in list(segment_names(tmp_path)):
        content = file_of(tmp_path, name).read_bytes()
        file_of(tmp_path, name).unlink()
        assert len(opened(tmp_path).index) < there
        file_of(tmp_path, name).write_bytes(content)


def test_prune_removes_old_segments_only_if_asked(tmp_path: Path) -> None:
    old, new = write(tmp_path, UNITS[:2], UNITS[2:])
    long_ago = time.time() - 10 * 24 * 3600
    os.utime(file_of(tmp_path, old), (long_ago, long_ago))
    (tmp_path / RUNS).mkdir()
    for name, time_s in (("a", 0), ("b", long_ago + 24 * 3600)):
        (tmp_path / RUNS / f"{name}.safetensors").touch()
        os.utime(tmp_path / RUNS / f"{name}.safetensors", (time_s, time_s))
    assert upkeep.prune(tmp_path) == (0, 0)
    assert upkeep.prune(tmp_path, older_than_days=20) == (1, 0)
    assert [path.name for path in (tmp_path / RUNS).iterdir()] == ["b.safetensors"]
    assert upkeep.prune(tmp_path) == upkeep.prune(tmp_path, older_than_days=11) == (0, 0)
    assert upkeep.prune(tmp_path, older_than_days=9.5)[0] == 1
    assert list(segment_names(tmp_path)) == [new]
    assert_holds(opened(tmp_path), UNITS[2:])


def test_prune_keeps_the_young_copy_of_a_unit(tmp_path: Path) -> None:
    """The only other one is old, and goes."""
    old, _ = write(tmp_path, UNITS[:2], UNITS[1:2])
    long_ago = time.time() - 10 * 24 * 3600
    os.utime(file_of(tmp_path, old), (long_ago, long_ago))
    assert upkeep.prune(tmp_path, older_than_days=1)[0] == 1
    assert_holds(opened(tmp_path), UNITS[1:2])


def prune_slowly(path: Path, _seed: int) -> None:
    """Choose what goes, and remove it when the file "go" is there."""
    sweep = upkeep.sweep

    def later(store: Path) -> int:
        (store / "chosen").touch()
        while not (store / "go").exists():
            time.sleep(0.01)
        return sweep(store)

    upkeep.sweep = later
    upkeep.prune(path)


def test_two_prunes_at_once_leave_a_copy_of_each_unit(tmp_path: Path) -> None:
    """One would keep the old copy, and remove the young one; the other the other way round."""
    copies = sorted(write(tmp_path, UNITS[:2], UNITS[1::-1]))
    write(tmp_path, UNITS[2:])
    long_ago = time.time() - 10 * 24 * 3600
    os.utime(file_of(tmp_path, copies[0]), (long_ago, long_ago))
    first = started(prune_slowly, tmp_path, 0)
    while not (tmp_path / "chosen").exists():
        time.sleep(0.01)
    with pytest.raises(
        ValueError,
        match=rf"prune is at work there \(process {first.pid} on .*; run this again when it has ended",
    ):
        upkeep.prune(tmp_path, older_than_days=1)
    (tmp_path / "go").touch()
    first.join()
    assert first.exitcode == 0
    assert_holds(opened(tmp_path), UNITS)


def test_prune_refuses_a_store_with_a_damaged_segment(tmp_path: Path) -> None:
    (name,) = write(tmp_path, UNITS)
    file_of(tmp_path, name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}.*--remove-damaged"):
        upkeep.prune(tmp_path)
    assert file_of(tmp_path, name).exists()


def test_prune_of_a_folder_that_is_no_store_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / ".index.safetensors.x.1.unfinished").write_text("x")
    os.utime(tmp_path / ".index.safetensors.x.1.unfinished", (0, 0))
    with pytest.raises(ValueError, match="holds no store"):
        upkeep.prune(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_store_is_described(tmp_path: Path) -> None:
    write(tmp_path, UNITS[:3], UNITS[2:])
    text = "\n".join(upkeep.describe(opened(tmp_path)))
    for words in (
        "features of a teacher, made by the engine megatron",
        "it ran with: attention sdpa, dtype bfloat16",
        "6 blocks of width 5, 2050 tokens",
        "blocks 2, 4, 6 before the final norm, bf16, 10 bytes each, 30 a token",
        "lens: missing; run fdd teach again",
        "4 units, 133 tokens, in 2 segment(s) of ",
        "tokens of a unit: 1 to 65, half of them at most 33",
    ):
        assert words in text
    write_lens(tmp_path)
    assert "lens: LayerNorm, head, its bias, a soft cap of 30 over the logits" in "\n".join(
        upkeep.describe(opened(tmp_path))
    )
    write(tmp_path / "empty")
    assert "0 units, 0 tokens, in 0 segment(s) of 0 B" in "\n".join(
        upkeep.describe(opened(tmp_path / "empty"))
    )


def test_info_does_not_believe_its_index_about_a_segment_that_is_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [name] = write(tmp_path, UNITS)
    write_lens(tmp_path)
    opened(tmp_path).save_index()
    file_of(tmp_path, name).write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        command(["info", str(tmp_path)])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(f"store: error: {file_of(tmp_path, name)}: ")
