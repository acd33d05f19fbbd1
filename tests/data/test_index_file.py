"""An index that is damaged is refused by name and in one line, whatever is wrong with it."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_fdd.data import prepared
from megatron_fdd.data.index_file import IndexFile, read_index_file
from megatron_fdd.data.prepared import open_set
from megatron_fdd.data.sources import open_sets
from tests.data.conftest import megatron_args

# Three documents of 3, 1 and 2 ids of two bytes: where each number of the index is.
HEADER, LENGTHS, POINTERS, BORDERS, END = 0, 34, 34 + 12, 34 + 12 + 24, 34 + 12 + 24 + 32


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    builder = IndexedDatasetBuilder(f"{tmp_path / 'p'}.bin", dtype=np.uint16)
    for ids in ([1, 2, 3], [4], [5, 6]):
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{tmp_path / 'p'}.idx")
    return tmp_path / "p"


def test_it_reads_what_megatron_reads(prefix: Path) -> None:
    ours, megatrons = read_index_file(f"{prefix}.idx"), IndexedDataset(str(prefix))
    assert ours.lengths.tolist() == megatrons.sequence_lengths.tolist() == [3, 1, 2]
    assert ours.pointers.tolist() == megatrons.index.sequence_pointers.tolist()
    assert (ours.dtype, ours.bin_bytes) == (np.dtype(np.uint16), 12)
    assert Path(f"{prefix}.idx").stat().st_size == END


def test_sequences_may_lie_in_any_order(prefix: Path) -> None:
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(LENGTHS)
        file.write(struct.pack("<3i3q", 1, 2, 3, 6, 8, 0))
    assert open_set(str(prefix)).document_lengths.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("at", "bytes_there", "message"),
    [
        (HEADER, b"X", "does not begin as an index of Megatron does"),
        (9, b"\2", "does not begin as an index of Megatron does"),
        (17, b"\77", "63 is the code of no type"),
        (17, b"\7", "of type float32, not whole numbers"),
        (18, struct.pack("<Q", 2**62), f"has {END} bytes and needs "),
        (26, struct.pack("<Q", 5), f"has {END} bytes and needs {END + 8}"),
        (26, struct.pack("<Q", 0), "its documents do not follow each other over 3 sequences"),
        (LENGTHS, struct.pack("<i", -3), "sequence 0 has -3 ids"),
        (
            POINTERS + 8,
            struct.pack("<q", 12),
            "sequence 1 has 1 ids from byte 12 on, and the .bin file 12 bytes",
        ),
        (POINTERS + 16, struct.pack("<q", -2), "sequence 2 has 2 ids from byte -2 on"),
        (POINTERS, struct.pack("<q", 2**63 - 1), "sequence 0 has 3 ids from byte 9223372036854775807 on"),
        (BORDERS, struct.pack("<q", 1), "its documents do not follow each other over 3 sequences"),
        (BORDERS + 8, struct.pack("<q", 9), "its documents do not follow each other over 3 sequences"),
        (BORDERS + 24, struct.pack("<q", 2), "its documents do not follow each other over 3 sequences"),
    ],
)
def test_damage_is_named(
    at: int, bytes_there: bytes, message: str, prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(at)
        file.write(bytes_there)
    unraised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)
    with pytest.raises(ValueError, match=rf"p\.idx cannot be read \(.*{message}.*\); prepare the set again"):
        open_set(str(prefix))
    assert unraised == []


def test_a_set_is_read_once_while_its_files_stay(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def noted(path: str) -> IndexFile:
        read.append(path)
        return read_index_file(path)

    monkeypatch.setattr(prepared, "read_index_file", noted)
    args = megatron_args("--data-path", str(prefix))
    assert all(open_sets(args) == open_sets(args) for _ in range(3))
    assert read == [f"{prefix}.idx"]
    os.utime(f"{prefix}.idx", ns=(1, 1))
    open_sets(args)
    assert read == [f"{prefix}.idx"] * 2


@pytest.mark.parametrize("left", [0, 20, END - 1])
def test_a_short_index_is_named(left: int, prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"p\.idx cannot be read \(it has (only )?{left} bytes"):
        open_set(str(prefix))


def test_other_lengths_are_those_of_another_set(prefix: Path) -> None:
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(LENGTHS)
        file.write(struct.pack("<i", 4))
    with pytest.raises(ValueError, match=r"p\.bin has 12 bytes, but its index needs 14"):
        open_set(str(prefix))


@pytest.mark.parametrize("end", [".bin", ".idx", ".prepared.json"])
def test_a_part_that_is_no_file_is_named(end: str, prefix: Path) -> None:
    """A pipe would be waited for."""
    path = Path(f"{prefix}{end}")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(
        ValueError, match=rf"^{path} is no regular file(, which a set needs)?; prepare the set again"
    ):
        open_set(str(prefix))
