"""Damage of a segment is one message with the file and a remedy, and never a wrong byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fdd.data.store import upkeep
from megatron_fdd.data.store.index import INDEX_FILE
from megatron_fdd.data.store.segment import read_layout
from tests.data.store.made import (
    IDENTITY,
    OTHER,
    assert_holds,
    file_of,
    flip,
    opened,
    read_whole,
    unit,
    write,
)

UNITS = [unit(3), unit(64), unit(70)]
OTHERS = [unit(5), unit(66)]
REMEDY = "run fdd store check STORE --remove-damaged, and then fdd teach, which makes it anew"


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    """A segment of a store with two."""
    name, _ = write(tmp_path / "store", UNITS, OTHERS)
    return file_of(tmp_path / "store", name)


def regions(segment: Path) -> dict[str, range]:
    """Return the bytes of each part of a segment."""
    layout = read_layout(segment, IDENTITY.digest)
    found = {
        name: range(getattr(layout, name)[0], sum(getattr(layout, name)))
        for name in ("keys", "lengths", "ids", "states", "sums")
    }
    return {"header": range(min(map(min, found.values()))), **found}


def check(segment: Path) -> upkeep.Checked:
    return upkeep.check_store(segment.parents[2])


def assert_refused_everywhere(segment: Path, message: str = "") -> None:
    """Check that opening or reading fails with the file and a remedy, and that the check finds it and nothing else."""
    with pytest.raises(ValueError, match=f"{segment.name}: .*{message}") as caught:
        assert_holds(opened(segment.parents[2]), UNITS)
    assert "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in ("--remove-damaged", "fdd teach", "remove it"))
    found = check(segment)
    assert [*found.damaged, *found.foreign] == [segment.stem]


def failure(segment: Path) -> str | None:
    """Open the store and compare all that it gives; return the message with which that ends."""
    try:
        assert_holds(opened(segment.parents[2]), UNITS)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("region", ["header", "keys", "lengths", "ids", "states", "sums"])
def test_no_flipped_bit_stays_unseen(segment: Path, region: str) -> None:
    right, places = segment.read_bytes(), regions(segment)[region]
    step = 5 if region == "header" else max(1, len(places) // 30)
    for number, at in enumerate(places[::step]):
        flip(segment, at, number % 8)
        found = check(segment)
        assert [*found.damaged, *found.foreign] == [segment.stem], at
        message = failure(segment)
        # The shape of a tensor is not needed for reading.
        assert message is not None or region == "header", at
        assert message is None or (segment.name in message and "fdd teach" in message)
        segment.write_bytes(right)


def _truncated(segment: Path) -> None:
    segment.write_bytes(segment.read_bytes()[:-1])


def _only_a_header(segment: Path) -> None:
    segment.write_bytes(segment.read_bytes()[: regions(segment)["header"].stop])


def _emptied(segment: Path) -> None:
    segment.write_bytes(b"")


def _zeros_behind(segment: Path) -> None:
    segment.write_bytes(segment.read_bytes() + bytes(8))


def _with_header(segment: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = segment.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    segment.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def _newer(segment: Path) -> None:
    _with_header(segment, lambda header: header["__metadata__"].update(version="2"))  # type: ignore[attr-defined]


def _another_kind(segment: Path) -> None:
    _with_header(segment, lambda header: header["__metadata__"].update(format="pt"))  # type: ignore[attr-defined]


def _offsets_of_another_type(segment: Path) -> None:
    _with_header(segment, lambda header: header["ids"].update(data_offsets=[0.0, 12.0]))  # type: ignore[attr-defined]


def _header_of_brackets(segment: Path) -> None:
    segment.write_bytes((60000).to_bytes(8, "little") + b"[" * 60000)


def _huge_header(segment: Path) -> None:
    segment.write_bytes(b"\xff" * 8 + segment.read_bytes()[8:])


def _folder(segment: Path) -> None:
    segment.unlink()
    segment.mkdir()


def _pipe(segment: Path) -> None:
    segment.unlink()
    os.mkfifo(segment)


def _of_another_store(segment: Path) -> None:
    (name,) = write(segment.parents[3] / "other", UNITS, identity=OTHER)
    segment.write_bytes(file_of(segment.parents[3] / "other", name).read_bytes())


def _another_segment(segment: Path) -> None:
    (name,) = write(segment.parents[3] / "more", [unit(7)])
    segment.write_bytes(file_of(segment.parents[3] / "more", name).read_bytes())


DAMAGES = {
    _truncated: f"cut off; {REMEDY}",
    _only_a_header: f"cut off; {REMEDY}",
    _emptied: f"is no segment of a store .*; {REMEDY}",
    _zeros_behind: f"cut off; {REMEDY}",
    _newer: "has the format version 2, not 1; read it with the version that wrote it",
    _another_kind: f"is no segment of a store .*; {REMEDY}",
    _offsets_of_another_type: f"is no segment of a store .*; {REMEDY}",
    _header_of_brackets: f"is no segment of a store .*; {REMEDY}",
    _huge_header: f"is no segment of a store .*; {REMEDY}",
    _of_another_store: r"is of the store .*, not of this one .*; move it out of the folder",
    _another_segment: f"has other keys than its name says; {REMEDY}",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_segment_is_refused_by_name(segment: Path, damage: Callable[[Path], None]) -> None:
    damage(segment)
    assert_refused_everywhere(segment, DAMAGES[damage])


FOREIGN = (_newer, _of_another_store, _another_segment)


@pytest.mark.parametrize("damage", FOREIGN)
def test_what_another_wrote_is_not_removed(segment: Path, damage: Callable[[Path], None]) -> None:
    """Nobody here can make it anew."""
    path = segment.parents[2]
    damage(segment)
    content, found = segment.read_bytes(), check(segment)
    assert (list(found.damaged), list(found.foreign)) == ([], [segment.stem])
    upkeep.remove_damaged(path, found)
    assert segment.read_bytes() == content


@pytest.mark.parametrize("damage", [_folder, _pipe])
def test_what_is_no_file_is_no_segment(segment: Path, damage: Callable[[Path], None]) -> None:
    """A pipe would be waited for."""
    path = segment.parents[2]
    store = opened(path)
    damage(segment)
    found = check(segment)
    assert (found.damaged, list(found.unread)) == ({}, [segment.stem])
    assert_holds(opened(path), OTHERS)
    with pytest.raises(ValueError, match=segment.name):
        read_whole(store, UNITS[0][0])


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d not in FOREIGN])
def test_the_rest_of_a_store_stays_when_the_damaged_goes(
    segment: Path, damage: Callable[[Path], None]
) -> None:
    path = segment.parents[2]
    opened(path).save_index()
    damage(segment)
    upkeep.remove_damaged(path, check(segment))
    assert check(segment).damaged == {}
    store = opened(path)
    assert len(store.index) == len(OTHERS)
    assert_holds(store, OTHERS)
    write(path, UNITS)
    assert_holds(opened(path), [*UNITS, *OTHERS])


CHANGED_LATER = {
    _truncated: "cut off; run",
    _emptied: "is no segment of a store",
    _of_another_store: "is of the store .*, not of this one",  # as long as the right one, with the same name and units
    _another_segment: f"was exchanged since {INDEX_FILE} was written; remove {INDEX_FILE}",
    Path.unlink: "is gone; was the store pruned while it was read",
}


@pytest.mark.parametrize("damage", CHANGED_LATER)
def test_a_segment_that_changes_while_the_store_is_open(
    segment: Path, damage: Callable[[Path], None]
) -> None:
    """Behind the index's back; the other segment is still read."""
    store = opened(segment.parents[2])
    damage(segment)
    with pytest.raises(ValueError, match=f"{segment.name}: .*{CHANGED_LATER[damage]}"):
        read_whole(store, UNITS[0][0])
    assert_holds(store, OTHERS)


def test_a_header_in_another_order_is_no_damage(segment: Path) -> None:
    """A copy by the library of the format has it so; the index knows where all lies."""
    opened(segment.parents[2]).save_index()
    content = segment.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    about = dict(reversed(header.pop("__metadata__").items()))
    other = json.dumps({**header, "__metadata__": about}, separators=(",", ":")).encode().ljust(size)
    assert other != content[8 : 8 + size]
    segment.write_bytes(content[:8] + other + content[8 + size :])
    assert check(segment).damaged == {}
    assert_holds(opened(segment.parents[2]), UNITS)


def test_an_open_file_that_is_cut_off_or_changed(segment: Path) -> None:
    """Files that were read once stay open, and are compared at each read all the same."""
    store = opened(segment.parents[2])
    assert_holds(store, UNITS)
    last = regions(segment)["states"][-1]
    with segment.open("r+b") as file:
        file.seek(last)
        byte = file.read(1)[0]
        file.seek(last)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(ValueError, match=f"{segment.name}: has other bytes than were written: .*{REMEDY}"):
        read_whole(store, UNITS[2][0])
    with segment.open("r+b") as file:
        file.truncate(last - 100)
    with pytest.raises(ValueError, match=f"{segment.name}: is cut off: .*{REMEDY}"):
        read_whole(store, UNITS[2][0])


def test_a_disk_that_fails_is_said_with_the_file(segment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(segment.parents[2])

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", fail)
        with pytest.raises(ValueError, match=f"{segment.name}: cannot be read .Input/output error.*{REMEDY}"):
            read_whole(store, UNITS[0][0])
    assert_holds(store, UNITS)


def test_a_read_that_comes_in_pieces_is_whole(segment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives at most 2 GiB at once, and some file systems less."""
    whole = os.preadv
    monkeypatch.setattr("os.preadv", lambda file, buffers, at: whole(file, [buffers[0][:7]], at))
    assert_holds(opened(segment.parents[2]), UNITS)


def test_ids_under_a_key_of_others_are_refused(segment: Path) -> None:
    store = opened(segment.parents[2])
    flip(segment, regions(segment)["ids"].start)
    with pytest.raises(ValueError, match=f"{segment.name}: has other tokens under the key of .*{REMEDY}"):
        read_whole(store, UNITS[0][0])
