"""The folder of --save: a new run in the folder of another is refused, and so is a second run at the same time."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.convert.hf_companions import carry_companions
from megatron_fdd.host.disk import writing
from megatron_fdd.host.saving import saved_iteration
from megatron_fdd.plan import save_folder
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.save_folder import LOCK_FILE, check_models_kept, check_nothing_lost, locked

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def flags(save: object, load: object = None, **more: object) -> Context:
    names = {"finetune": False, "skip_train": False, "pretrained_checkpoint": None}
    names |= {"non_persistent_global_ckpt_dir": None} | more
    folders = {"save": save, "load": load}
    given = {name: folder if folder is None else str(folder) for name, folder in folders.items()}
    return Context(FddConfig(teacher_load="T"), argparse.Namespace(**given, **names))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a folder with a checkpoint of step 400."""
    folder = tmp_path / "R"
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("400")
    return folder


@pytest.mark.parametrize("load", [None, "elsewhere", "R/iter_0000400"])
def test_a_finished_run_is_not_begun_again(load: str | None, run: Path) -> None:
    load = load and str(run.parent / load)
    with pytest.raises(ValueError, match="holds a checkpoint of iteration 400") as error:
        check_nothing_lost(flags(run, load))
    for way in (f"give --load {run};", "give another --save", f"delete {run}"):
        assert way in str(error.value)


def test_a_run_goes_on_however_its_folder_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.parent / "link").symlink_to(run)
    monkeypatch.chdir(run.parent)
    for load in (run, f"{run}/", "R", "./R", "link"):
        check_nothing_lost(flags(run, load))


def test_nothing_is_lost(run: Path) -> None:
    check_nothing_lost(flags(None))
    check_nothing_lost(flags(run.parent / "new"))
    check_nothing_lost(flags(run.parent))
    check_nothing_lost(flags(run, skip_train=True))


def test_weights_alone_begin_at_step_0_again(run: Path) -> None:
    with pytest.raises(ValueError, match="To go on from it leave --finetune out"):
        check_nothing_lost(flags(run, run, finetune=True))


def test_a_converted_model_is_named_as_one(run: Path) -> None:
    (run / "latest_checkpointed_iteration.txt").write_text("release\n")
    with pytest.raises(ValueError, match="holds a converted model"):
        check_nothing_lost(flags(run))
    check_nothing_lost(flags(run, run))


def test_a_model_that_the_run_reads_is_not_saved_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its folder is written, and although --load names it too."""
    (run.parent / "link").symlink_to(run)
    monkeypatch.chdir(run.parent)
    for save in (run, "R", "link", "./link/"):
        for name in (str(run), "link"):
            taught = replace(flags(save, save), config=FddConfig(teacher_load=name))
            begun = flags(save, save, pretrained_checkpoint=name)
            for known, flag in ((taught, "--teacher-load"), (begun, "--pretrained-checkpoint")):
                with pytest.raises(ValueError, match=f"--save {save}: is the folder of {flag}, and the next"):
                    check_models_kept(known)


@pytest.mark.parametrize("emptied", [".", "R", "link"])
def test_no_model_lies_where_megatron_removes_checkpoints(
    emptied: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for them in all folders below."""
    (run.parent / "link").symlink_to(run)
    monkeypatch.chdir(run.parent)
    temporary = {"non_persistent_global_ckpt_dir": emptied}
    elsewhere = FddConfig(teacher_load="../T")
    for known, flag in (
        (flags(run, **temporary), "--save"),
        (flags("../S", run, **temporary), "--load"),
        (flags("../S", pretrained_checkpoint=str(run), **temporary), "--pretrained-checkpoint"),
        (replace(flags("../S", **temporary), config=FddConfig(teacher_load=str(run))), "--teacher-load"),
    ):
        told = f"^--non-persistent-global-ckpt-dir {re.escape(emptied)}: {flag} {run} is in it, and Megatron removes"
        with pytest.raises(ValueError, match=told):
            check_models_kept(known if flag == "--teacher-load" else replace(known, config=elsewhere))
    check_models_kept(flags(run, run, non_persistent_global_ckpt_dir=str(run / "non_persistent")))


def test_another_folder_may_be_saved_to(run: Path) -> None:
    taught = FddConfig(teacher_load=str(run))
    for known in (
        flags(None, run, pretrained_checkpoint=str(run)),
        flags(run / "below", pretrained_checkpoint=str(run)),
        flags(run, run),
        flags(run, run, pretrained_checkpoint=str(run), skip_train=True),
    ):
        check_models_kept(known)
    check_models_kept(replace(flags(run / "below"), config=taught))


def in_another_process(action: Callable[[], object]) -> str:
    """Return the message of the ValueError that `action` raises in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
        except ValueError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as said:
        return said.read()


def hold(folder: Path) -> None:
    with locked(str(folder)):
        pass


def test_two_runs_do_not_save_into_one_folder(run: Path) -> None:
    with locked(str(run)):
        said = in_another_process(lambda: hold(run))
        assert said.startswith(f"--save {run}: another run saves there (process {os.getpid()} on ")
        assert in_another_process(lambda: hold(run.parent)) == ""
    assert in_another_process(lambda: hold(run)) == ""


def test_only_rank_0_holds_the_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with locked(str(run)), locked(None):
        assert not (run / LOCK_FILE).exists()


def test_a_file_system_without_locks_keeps_nobody_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    hold(run)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"9" * 5000, b"-1", "\u0663".encode()])
def test_a_tracker_that_names_no_iteration(content: bytes, run: Path) -> None:
    (run / "latest_checkpointed_iteration.txt").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^--save {run}: .* says '.{{0,30}}', not an iteration .*; or give another"
    ):
        check_nothing_lost(flags(run))
    assert saved_iteration(str(run)) is None


def test_pipes_in_the_folder_are_refused(tmp_path: Path) -> None:
    """Megatron would wait in its first save until somebody reads the tracker."""
    for name in ("latest_checkpointed_iteration.txt", LOCK_FILE):
        os.mkfifo(tmp_path / name)
    for load in (None, tmp_path):
        with pytest.raises(
            ValueError, match=rf"^--save {tmp_path}: latest.*txt is no regular file; remove it"
        ):
            check_nothing_lost(flags(tmp_path, load))
    with (
        pytest.raises(ValueError, match=rf"^--save {tmp_path}/{LOCK_FILE}: is a pipe"),
        locked(str(tmp_path)),
    ):
        pass


def test_a_full_disk_is_reported_by_what_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the lock, whose end would hide the error of the run."""
    monkeypatch.setattr(save_folder, "regular_file", lambda _flag, _path: Path("/dev/full"))
    with pytest.raises(ValueError, match="what needs it"), locked(str(tmp_path)):
        raise ValueError("what needs it")
    with locked(str(tmp_path)):
        pass


def test_companions_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copyfile(_source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    for name in ("a", "b"):
        (tmp_path / "load" / "hf").mkdir(parents=True, exist_ok=True)
        (tmp_path / "load" / "hf" / name).touch()
    (tmp_path / "save").mkdir()
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with (
        pytest.raises(ValueError, match="^--save .*: cannot be written: No space left on device .*make room"),
        writing("--save", tmp_path / "save"),
    ):
        carry_companions(tmp_path / "load", tmp_path / "save")
    with pytest.raises(OSError, match="No space left on device") as raised:
        carry_companions(tmp_path / "load", tmp_path / "save")
    assert raised.value.filename == str(tmp_path / "save" / "hf"), (
        "nobody knows the place of a copy that is gone"
    )
    monkeypatch.undo()
    carry_companions(tmp_path / "load", tmp_path / "save")
    assert sorted(path.name for path in (tmp_path / "save" / "hf").iterdir()) == ["a", "b"]
