"""A disk that cannot take a file: one message that says what to do, and nothing half-written in the store."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.data.store.lens import LENS_FILE
from megatron_fdd.data.store.segment import SegmentWriter
from megatron_fdd.data.store.whole_file import sweep
from tests.data.store.made import (
    IDENTITY,
    P,
    T,
    assert_holds,
    file_of,
    opened,
    unit,
    write,
    write_lens,
)

UNITS = [unit(30), unit(64)]
DAY_S = 24 * 3600


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Let the system refuse files of more bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def files(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file())


def writer(path: Path) -> SegmentWriter:
    made = SegmentWriter(path, IDENTITY.digest, T, P)
    for ids, states in UNITS:
        made.add(ids, states)
    return made


@pytest.mark.parametrize("most", [0, 100, 2000])
def test_a_segment_that_finds_no_room_leaves_nothing_and_can_be_tried_again(
    tmp_path: Path, most: int
) -> None:
    write(tmp_path, [unit(9)])
    before = files(tmp_path)
    made = writer(tmp_path)
    with (
        small_files(most),
        pytest.raises(
            ValueError, match=rf"^--store {tmp_path}: cannot be written: File too large .*; raise the limit"
        ),
    ):
        made.flush()
    assert files(tmp_path) == before
    made.flush()
    assert_holds(opened(tmp_path), [unit(9), *UNITS])


@pytest.mark.parametrize("name", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "make room there"), (errno.EACCES, "give a place that you may use")]
)
def test_what_the_system_refuses_is_said_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, remedy: str
) -> None:
    write(tmp_path)
    before = files(tmp_path)

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    made = writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(name, refuse)
        with pytest.raises(ValueError, match=f"cannot be written: {os.strerror(code)} .*; {remedy}"):
            made.flush()
    assert files(tmp_path) == before


def test_a_lens_that_finds_no_room_is_not_there(tmp_path: Path) -> None:
    write(tmp_path)
    with small_files(3000), pytest.raises(ValueError, match="cannot be written: File too large"):
        write_lens(tmp_path)
    assert not (tmp_path / LENS_FILE).exists()
    assert len(files(tmp_path)) == 1
    write_lens(tmp_path)


def test_a_writer_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    before = files(tmp_path)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer(tmp_path).flush()
    assert files(tmp_path) == before


def test_leftovers_go_when_they_are_a_day_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed writer leaves a file under a name of its own; another may still be at work on one like it."""
    (name,) = write(tmp_path, UNITS)
    write_lens(tmp_path)
    opened(tmp_path).save_index()
    sound = files(tmp_path)
    with monkeypatch.context() as patch:  # what a kill leaves
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(Path, "replace", lambda *_: None)
        write(tmp_path, [unit(3)])
        writer(tmp_path).flush()
        opened(tmp_path).save_index()
    left = [path for path in files(tmp_path) if path not in sound]
    assert len(left) == 3
    assert all(path.name.startswith(".") for path in left)
    assert opened(tmp_path).index.names == [name]
    now = time.time()
    for number, path in enumerate(left):
        os.utime(path, (now, now - DAY_S + (60 if number == 0 else -60)))
    for path in sound:
        os.utime(path, (now, now - 100 * DAY_S))
    assert sweep(tmp_path) == 2
    assert files(tmp_path) == sorted([*sound, left[0]])
    assert file_of(tmp_path, name).exists()
