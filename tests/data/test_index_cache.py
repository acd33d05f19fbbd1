"""Megatron's index cache after a kill or a full disk: what is not whole is built again, and nothing else is touched."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.safe_globals import safe_numpy_load

from megatron_fdd.data import index_cache
from megatron_fdd.data.index_cache import mend_cache, told_cache
from megatron_fdd.data.megatron_tokenizer import load_tokenizer
from megatron_fdd.data.provider import build_datasets
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import megatron_args

ENDS = ("document_index", "sample_index", "shuffle_index", "dataset_index", "dataset_sample_index")


def args_for(folder: Path, sets: Path, *more: str) -> argparse.Namespace:
    """Return the arguments of a run that reads a blend, which has an index besides those of its sets."""
    text = str(sets / "text")
    blend = ("--data-path", "1", text, "2", text, "--split", "1,0,0", "--eval-iters", "0")
    args = megatron_args(*blend, "--data-cache-path", str(folder), *more)
    args.rank = 0
    return args


@pytest.fixture
def cache(tmp_path: Path, sets: Path, hf: TokenizerSettings, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(index_cache, "_GROWTH_S", 0.0)
    build_datasets(args_for(tmp_path / "cache", sets), [6, 0, 0], load_tokenizer(hf))
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def of_kind(cache: Path, kind: str) -> Path:
    return sorted(cache.glob(f"*-{kind}.npy"))[0]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def only_header(path: Path) -> None:
    os.truncate(path, 128)


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 4)


def of_another_dtype(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float32))


def of_another_shape(path: Path) -> None:
    array = np.load(path)
    np.save(path, array.reshape(-1) if array.ndim > 1 else array[:, None])


@pytest.mark.parametrize(
    "damage", [cut, empty, only_header, garbage, append, of_another_dtype, of_another_shape]
)
def test_what_is_not_whole_is_built_again(
    damage: Callable[[Path], None], cache: Path, sets: Path, hf: TokenizerSettings
) -> None:
    before = contents(cache)
    args = args_for(cache, sets)
    damaged = {of_kind(cache, kind) for kind in ENDS}
    for path in damaged:
        damage(path)
    with pytest.warns(UserWarning, match="a run was killed, or its disk was full") as told:
        mend_cache(args)
    assert sorted(str(each.message).split()[3] for each in told) == sorted(map(str, damaged))
    gone = {path.name for path in damaged}
    assert contents(cache).keys() == before.keys() - gone - {f"{name}.xxh3" for name in gone}
    build_datasets(args, [6, 0, 0], load_tokenizer(hf))
    assert contents(cache) == before


@pytest.mark.parametrize("kind", ["shuffle_index", "dataset_sample_index"])
def test_an_index_of_another_length_is_built_again(kind: str, cache: Path, sets: Path) -> None:
    path = of_kind(cache, kind)
    np.save(path, np.load(path)[:-1])
    with pytest.warns(UserWarning, match=r"has \d+ entries, \w+.npy beside it \d+"):
        mend_cache(args_for(cache, sets))
    assert not path.exists()


def test_what_is_whole_or_somebody_elses_stays(cache: Path, sets: Path) -> None:
    (cache / "notes.npy").write_bytes(b"mine")
    before = contents(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mend_cache(args_for(cache, sets))
        cut(of_kind(cache, "sample_index"))
        after = contents(cache)
        args = args_for(cache, sets)
        args.rank = 1
        mend_cache(args)
    assert after.keys() == before.keys()
    assert contents(cache) == after


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ENDS)
def test_a_bit_that_has_changed_is_found(kind: str, cache: Path, sets: Path, hf: TokenizerSettings) -> None:
    """The length is right and the numbers look well: later runs would read other samples."""
    before = contents(cache)
    path = of_kind(cache, kind)
    flip(path)
    with pytest.warns(UserWarning, match=rf"{path} has other bytes than when it was built: .*; removed"):
        mend_cache(args_for(cache, sets))
    assert contents(cache).keys() == before.keys() - {path.name, f"{path.name}.xxh3"}
    build_datasets(args_for(cache, sets), [6, 0, 0], load_tokenizer(hf))
    assert contents(cache) == before


def test_what_other_runs_have_left_is_not_read(cache: Path, sets: Path) -> None:
    for kind in ENDS:
        flip(of_kind(cache, kind))
    before = contents(cache)
    for other in (("--seq-length", "4"), ("--seed", "5")):
        mend_cache(args_for(cache, sets, *other))
    assert contents(cache) == before


def test_a_cache_without_sums_gets_them(cache: Path, sets: Path, hf: TokenizerSettings) -> None:
    """An earlier version built it, or its run was killed before it wrote them; nobody else may need to write there."""
    sums = {path.name: path.read_bytes() for path in cache.glob("*.xxh3")}
    assert len(sums) == len(list(cache.glob("*.npy")))
    for name in sums:
        (cache / name).unlink()
    before = contents(cache)
    mend_cache(args_for(cache, sets))
    assert contents(cache) == before
    build_datasets(args_for(cache, sets), [6, 0, 0], load_tokenizer(hf))
    assert contents(cache) == before | sums


def test_a_file_that_another_run_writes_is_waited_for(
    cache: Path, sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = of_kind(cache, "shuffle_index")
    left = list(path.read_bytes())
    before = contents(cache)
    path.write_bytes(b"")
    waits = []

    def write_more(seconds: float) -> None:
        waits.append(seconds)
        with path.open("ab") as file:
            file.write(bytes(left[:100]))
        del left[:100]

    monkeypatch.setattr(index_cache.time, "sleep", write_more)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mend_cache(args_for(cache, sets))
    assert len(waits) > 1
    assert contents(cache) == before


def test_a_file_that_another_run_removes_is_not_missed(
    cache: Path, sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it goes: after it was found, before it is measured, after the wait, before it is removed."""
    args, real = args_for(cache, sets), index_cache._size
    for moment in range(3):
        path = of_kind(cache, ENDS[moment])
        cut(path)
        calls = []

        def vanish(path: Path, moment: int = moment, calls: list[int] = calls) -> int | None:
            calls.append(moment)
            if len(calls) == 1 + (moment == 1):
                path.unlink()
            size = real(path)
            return 0 if moment == 2 else size

        monkeypatch.setattr(index_cache, "_size", vanish)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            mend_cache(args)
        assert calls
        assert not path.exists()


def test_where_nobody_would_build_it_again_it_is_refused(cache: Path, sets: Path) -> None:
    cut(of_kind(cache, "shuffle_index"))
    before = contents(cache)
    with pytest.raises(ValueError, match="Start once without --dataloader-fast-cache-load"):
        mend_cache(args_for(cache, sets, "--dataloader-fast-cache-load"))
    assert contents(cache) == before


def test_the_default_folder_is_looked_at(
    sets: Path, hf: TokenizerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "_GROWTH_S", 0.0)
    for end in (".bin", ".idx", ".prepared.json"):
        shutil.copy(f"{sets / 'text'}{end}", f"{tmp_path / 'text'}{end}")
    args = megatron_args("--data-path", str(tmp_path / "text"), "--split", "1,0,0", "--eval-iters", "0")
    args.rank = 0
    build_datasets(args, [6, 0, 0], load_tokenizer(hf))
    path = of_kind(tmp_path / "text" / "cache" / "TextDataset_indices", "sample_index")
    empty(path)
    with pytest.warns(UserWarning, match="is cut off"):
        mend_cache(args)
    assert not path.exists()


def test_a_full_disk_names_the_cache(cache: Path, sets: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(cache / "x.npy"))
    told = f"^the index cache in {cache} cannot be written: .*No space left"
    with pytest.raises(ValueError, match=told), told_cache(args_for(cache, sets)):
        raise Exception("Failed to write dataset materials") from full  # noqa: TRY002  # as Megatron does
    with pytest.raises(IndexError), told_cache(args_for(cache, sets)):
        raise IndexError


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused(put: Callable[[Path], None], kind: str, cache: Path, sets: Path) -> None:
    path = of_kind(cache, kind)
    path.unlink()
    put(path)
    with pytest.raises(
        ValueError, match=rf"^the index cache {path} is no regular file; remove it, or give another"
    ):
        mend_cache(args_for(cache, sets))
    assert os.path.lexists(path)


def test_an_index_that_cannot_be_read_is_named(cache: Path, sets: Path) -> None:
    """It was whole when it was looked at."""
    path = of_kind(cache, "shuffle_index")
    cut(path)
    with (
        pytest.raises(
            ValueError, match=rf"^the index cache in {cache} cannot be read: .*\. Delete that folder"
        ),
        told_cache(args_for(cache, sets)),
    ):
        safe_numpy_load(path, allow_pickle=True, mmap_mode="r")
