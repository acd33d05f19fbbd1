"""`fdd export --watch`: which checkpoint is next, what waits, what is skipped, and when a watch ends."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from megatron_fdd.convert import watched_folder
from megatron_fdd.convert.watched_folder import End, WatchedFolder
from megatron_fdd.host.checkpoint import TRACKER_FILE
from megatron_fdd.host.file_sums import SUMS_FILE


class Training:
    """A folder that looks like one to which a training of nine steps saves, and a watch with a clock of its own."""

    def __init__(self, root: Path) -> None:
        self.load, self.out, self.now_s = root / "save", root / "out", 0.0
        self.watch = WatchedFolder(self.load, self.out, 60.0, lambda: self.now_s)

    def begin(self, iteration: int) -> Path:
        folder = self.load / f"iter_{iteration:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def save(self, iteration: int, *, sums: bool = True) -> None:
        folder = self.begin(iteration)
        (folder / ".metadata").touch()
        (self.load / TRACKER_FILE).write_text(str(iteration))
        if sums:
            (folder / SUMS_FILE).touch()

    def export(self, iteration: int) -> None:
        assert self.watch.next_step() == iteration
        self.is_there(iteration)
        self.watch.note(iteration, "")

    def is_there(self, iteration: int) -> None:
        folder = self.watch.place(iteration)
        folder.mkdir(parents=True)
        (folder / "checksums.json").touch()

    def end(self) -> End:
        end = self.watch.next_step()
        assert isinstance(end, End)
        return end


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    path = mock.patch.object(watched_folder, "find_checkpoint")
    args = mock.patch.object(watched_folder, "read_checkpoint_args", return_value=Namespace(train_iters=9))
    with path, args:
        yield Training(tmp_path)


def test_each_checkpoint_once_the_oldest_first(training: Training) -> None:
    assert training.watch.next_step() is None  # there is no folder yet
    training.save(3)
    training.save(6)
    training.export(3)
    training.export(6)
    assert training.watch.next_step() is None
    training.save(9)
    training.export(9)
    end = training.end()
    assert end.line == (
        f"{training.out}: 3 checkpoint(s) of {training.load} exported; the training has ended with iteration 9"
    )
    assert not end.is_failure


def test_a_save_under_way_is_waited_for(training: Training) -> None:
    training.save(3)
    training.export(3)
    folder = training.begin(6)
    (folder / ".metadata").touch()
    assert training.watch.next_step() is None  # its tracker is missing
    training.save(6, sums=False)
    assert training.watch.next_step() is None  # its sums come next
    training.save(6)
    assert training.watch.next_step() == 6
    (folder / ".metadata").unlink()
    assert training.watch.next_step() is None  # it is saved a second time
    (training.load / TRACKER_FILE).write_text("")
    assert training.watch.next_step() is None  # the tracker is being written


def test_another_program_writes_no_sums(training: Training) -> None:
    training.watch.idle_s = 10_000.0
    training.save(3, sums=False)
    assert training.watch.next_step() is None
    training.now_s = 601.0
    assert training.watch.next_step() == 3
    training.now_s = 0.0
    training.save(6, sums=False)
    training.export(3)  # a later one is there, so its save has ended
    assert training.watch.next_step() is None


def test_what_is_exported_is_skipped(training: Training) -> None:
    for iteration in (3, 6, 9):
        training.save(iteration)
    training.is_there(3)
    training.watch.place(6).mkdir()  # not an export: the next one says so
    training.watch.place(6).joinpath("notes").touch()
    assert training.watch.next_step() == 6


def test_with_nothing_left_a_longer_training_is_waited_for(training: Training) -> None:
    training.save(9)
    training.is_there(9)
    assert training.watch.next_step() is None
    training.now_s = 61.0
    assert training.end().line.endswith(
        " 0 checkpoint(s) of " + f"{training.load} exported; no new checkpoint for 60 s"
    )


def test_one_that_cannot_be_exported_is_named(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    training.save(6)
    training.save(9)
    for _ in range(2):
        assert capsys.readouterr().err == ""
        assert training.watch.next_step() == 6
        training.watch.note(6, "a file is damaged")
    assert capsys.readouterr().err == "iteration 6 is not exported: a file is damaged\n"
    training.export(9)
    end = training.end()
    assert end.is_failure
    assert end.line.endswith("; not exported, see above: 6; the same command tries them again")


def test_one_that_fails_once_only(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    training.save(9)
    training.watch.note(9, "the tracker was being written")
    training.export(9)
    assert not training.end().is_failure
    assert capsys.readouterr().err == ""


def test_one_that_the_training_removes(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    training.save(6)
    training.save(9)
    training.watch.note(6, "a file is missing")
    shutil.rmtree(training.load / "iter_0000006")
    training.export(9)
    said = "iteration 6 is not exported: the training removed it while it was read\n"
    assert capsys.readouterr().err == said
    assert not training.end().is_failure
