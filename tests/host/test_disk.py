"""Files that cannot be written: the flag, the system's message, the free space, the remedy."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fdd.convert.hf_writer import check_new_folder, new_folder
from megatron_fdd.data.parts import Parts
from megatron_fdd.data.store.whole_file import unfinished
from megatron_fdd.host import disk
from megatron_fdd.host.disk import explain, make_folder, replacing, sized, told_by_torchs_writer, writing

TORCHS = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"


def system_error(number: int, *names: Path) -> OSError:
    """Return an error as the system raises it: about no file, about one, or about one that is copied to another."""
    first, second = [*map(str, names), None, None][:2]
    return OSError(number, os.strerror(number), first, None, second)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (system_error(errno.ENOSPC), r"No space left on device \(\d+ MiB free there\); make room"),
        (system_error(errno.EDQUOT), r"Disk quota exceeded .*; make room"),
        (system_error(errno.EROFS), r"Read-only file system .*; give a place that you may use"),
        (system_error(errno.EIO), r"Input/output error .*; give another place"),
        (RuntimeError(TORCHS), r"torch's writer failed: .*unexpected pos 704.*; make room"),
    ],
)
def test_what_cannot_be_written_names_the_flag(tmp_path: Path, error: Exception, expected: str) -> None:
    given = tmp_path / "new" / "x"
    with (
        pytest.raises(ValueError, match=f"^--save {given}: cannot be written: {expected}"),
        writing("--save", given),
    ):
        raise error


# What is written, and removed after an error.
UNDONE: dict[str, Callable[[Path], AbstractContextManager[object]]] = {
    "a model": lambda path: new_folder(path, "--out"),
    "a file of a store": lambda path: unfinished(path.parent, path),
}


def _fail_at(place: object) -> None:
    if isinstance(place, Path) and not place.exists():
        place.touch()
    raise system_error(errno.ENOSPC)


@pytest.mark.parametrize("name", UNDONE)
def test_the_room_is_that_before_anything_is_removed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(_path: Path) -> Any:
        return SimpleNamespace(free=0 if any(tmp_path.iterdir()) else 5 << 20)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with (
        pytest.raises(ValueError, match=r"No space left on device \(0 MiB free there\)"),
        UNDONE[name](tmp_path / "out") as place,
    ):
        _fail_at(place)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("cause", [system_error(errno.ENOSPC), KeyboardInterrupt()])
def test_what_stopped_torchs_writer_is_raised(cause: BaseException) -> None:
    class Stopped(io.BytesIO):
        is_first = True

        def write(self, data: Any) -> int:
            if len(data) > 1000 and self.is_first:
                self.is_first = False
                raise cause
            return super().write(data)

    with pytest.raises(type(cause)) as raised, told_by_torchs_writer():
        torch.save(torch.zeros(1000), Stopped())
    assert raised.value is cause


@pytest.mark.parametrize("name", ["x/a", ".x.incomplete/a", "x_train.bin", "."])
def test_a_name_that_nobody_gave_is_not_said(tmp_path: Path, name: str) -> None:
    given, elsewhere = tmp_path / "x", tmp_path / "source"
    for names in ([tmp_path / name], [elsewhere, tmp_path / name]):
        with pytest.raises(ValueError, match=f"^--save {given}: ") as raised, writing("--save", given):
            raise system_error(errno.ENOSPC, *names)
        assert "incomplete" not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        system_error(errno.EACCES, Path("/elsewhere/source")),
        OSError("what a library says of a model"),
        RuntimeError("anything"),
        ValueError("ours"),
    ],
)
def test_what_goes_wrong_with_others_stays(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=re.escape(str(error))) as raised, writing("--save", tmp_path / "x"):
        raise error
    assert raised.value is error


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for given in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(
            ValueError, match=f"^--out {given}: .* {tmp_path}/file is a file, and a folder is needed; give"
        ):
            make_folder("--out", given, given)
    make_folder("--out", tmp_path / "a" / "b", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_new_folder_is_looked_at_before_the_work(tmp_path: Path) -> None:
    """`fdd student` runs a teacher for minutes before it writes."""
    (tmp_path / "file").touch()
    for given in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        with pytest.raises(ValueError, match=f"^--hf-out {given}: .* is a file, and a folder is needed"):
            check_new_folder(given, "--hf-out")
    check_new_folder(tmp_path / "a" / "b", "--hf-out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_errors_get_a_remedy() -> None:
    missing = system_error(errno.ENOENT, Path("/nowhere"))
    assert explain(missing) == "/nowhere: No such file or directory; give another path"
    assert explain(system_error(errno.ENOSPC)).endswith(
        "No space left on device; make room there, or give another place"
    )
    copying = OSError(errno.EFBIG, "File too large", "from", None, "to")
    assert explain(copying).startswith(
        "from -> to: File too large; raise the limit of a file's size (ulimit -f)"
    )
    assert explain(ValueError("ours")) == "ours"
    assert explain(OSError("a library's")) == "a library's"


def test_a_link_in_the_place_of_a_scratch_folder_is_not_followed(tmp_path: Path) -> None:
    """What lies there is not this program's to delete."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    for name in (".out.incomplete", ".text.partial"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"^--hf-out .*\.out\.incomplete is a link, .*; remove it"):  # noqa: SIM117
        with new_folder(tmp_path / "out", "--hf-out"):
            pass
    with pytest.raises(ValueError, match=r"^--output-prefix .*\.text\.partial is a link, .*; remove it"):
        Parts([str(tmp_path / "text")], "text", "text", None, None)  # type: ignore[arg-type]
    assert (tmp_path / "mine" / "letter").exists()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (71_234_000, "71.2 MB"),
        (999_600_000, "1 GB"),
        (5368709120000, "5.37 TB"),
        (10**19, "10,000 PB"),
    ],
)
def test_bytes_have_the_unit_that_suits_them(number: int, text: str) -> None:
    assert sized(number) == text


def test_a_device_in_the_place_of_a_folder_is_called_so() -> None:
    with pytest.raises(
        ValueError, match="^--out /dev/null: .* /dev/null is a device, and a folder is needed; give"
    ):
        make_folder("--out", "/dev/null", "/dev/null")


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(shared: bool, tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    for content in ("one", "another"):
        with replacing(path, shared=shared) as partial:
            partial.write_text(content)
        assert path.read_text() == content
    for error in (system_error(errno.ENOSPC), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            _fail(path, error, shared=shared)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"], "nothing takes the missing room"
    assert path.read_text() == "another"


def _fail(path: Path, error: BaseException, *, shared: bool) -> None:
    with replacing(path, shared=shared) as partial:
        partial.write_text("hal")
        raise error


def test_what_the_disk_refuses_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells such an error once: to the first who asks."""
    monkeypatch.setattr(disk, "_FLUSH_S", 0.001)
    asked = threading.Event()

    def refuse(_descriptor: int) -> None:
        asked.set()
        raise OSError(errno.EIO, "the disk is damaged")

    monkeypatch.setattr(os, "fdatasync", refuse)
    with (
        pytest.raises(OSError, match="damaged"),
        (tmp_path / "file").open("wb") as file,
        disk.flushed_behind(file),
    ):
        assert asked.wait(10)
