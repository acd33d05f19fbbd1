"""What lies beside the segments of a store, or in the place of one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_fdd.data.store import upkeep
from megatron_fdd.data.store.lens import LENS_FILE
from megatron_fdd.data.tokenizer_identity import TOKENIZER_FOLDER
from tests.data.store.made import assert_holds, file_of, flip, opened, unit, write, write_lens
from tests.data.tokenizer_identity import variants

UNITS = [unit(length, 7) for length in (1, 64, 65, 3)]


def test_a_folder_in_the_place_of_a_segment_is_named(tmp_path: Path) -> None:
    (name,) = write(tmp_path, UNITS)
    segment = file_of(tmp_path, name)
    segment.unlink()
    segment.mkdir()
    with pytest.raises(
        ValueError, match=f"{segment}: is a folder, where a file of the store belongs; remove it"
    ):
        write(tmp_path, UNITS)
    segment.rmdir()
    write(tmp_path, UNITS)
    assert_holds(opened(tmp_path), UNITS)


def test_a_damaged_lens_is_found(tmp_path: Path) -> None:
    """And all segments are looked at all the same; one is a pipe, which nobody waits for."""
    names = write(tmp_path, UNITS[:2], UNITS[2:])
    write_lens(tmp_path)
    flip(tmp_path / LENS_FILE, -1)
    pipe = file_of(tmp_path, names[0])
    pipe.unlink()
    os.mkfifo(pipe)
    checked = upkeep.check_store(tmp_path)
    assert "lens cannot be read" in str(checked.beside)
    assert (checked.num_segments, checked.num_units) == (2, 2)
    assert "is no regular file" in checked.unread[names[0]]


def test_a_damaged_tokenizer_beside_the_segments_is_found(tmp_path: Path) -> None:
    write(tmp_path, UNITS)
    write_lens(tmp_path)
    variants.write(tmp_path / TOKENIZER_FOLDER)
    assert upkeep.check_store(tmp_path).beside is None
    file = tmp_path / TOKENIZER_FOLDER / "tokenizer.json"
    file.write_text(file.read_text()[:100])
    assert "tokenizer" in str(upkeep.check_store(tmp_path).beside)
