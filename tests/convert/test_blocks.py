"""Values that come in blocks, large writes, and the threads of a conversion."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_fdd.convert.checkpoint_entries import Pieces, blocks_of
from megatron_fdd.convert.ranks import conversion_ranks
from megatron_fdd.host import disk


def test_blocks_that_do_not_follow_one_another_are_joined() -> None:
    value = torch.arange(12.0).view(3, 4)
    columns = value.split(2, dim=1)
    pieces = [
        ShardedTensor("w", part, part.dtype, (3, 2), (3, 4), (0, at), (1, 2))
        for part, at in zip(columns, (0, 2), strict=True)
    ]
    (found,) = blocks_of(value.to("meta"), pieces, columns)
    assert torch.equal(found, value)
    rows = value.split(1)
    pieces = [
        ShardedTensor("w", row, row.dtype, (1, 4), (3, 4), (at, 0), (3, 1)) for at, row in enumerate(rows)
    ]
    found = blocks_of(value, pieces, rows)
    assert [block.data_ptr() for block in found] == [row.data_ptr() for row in rows]
    assert torch.equal(torch.cat(found), value)


def test_blocks_that_are_no_pieces_are_joined() -> None:
    """One tensor is written as it is, however many blocks it comes in."""
    value = torch.arange(12.0).view(3, 4)
    entry = ShardedTensor("w", value, value.dtype, (3, 4), (3, 4), (0, 0), (1, 1))
    (piece,) = Pieces({"w": entry}, ()).of("w", list(value.split([1, 2])))
    assert piece.data is not None
    assert torch.equal(piece.data, value)


def test_an_operator_takes_one_thread_in_a_conversion() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with conversion_ranks():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_large_write_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, behind what waits in the buffer; what the disk refuses in the middle is told."""
    monkeypatch.setattr(disk, "_PIECE_BYTES", 10_000)
    data = bytes(range(256)) * 400
    with disk.large_file(tmp_path / "file") as file:
        file.write(b"head")
        file.write(data)
        assert file.tell() == 4 + len(data)
    assert (tmp_path / "file").read_bytes() == b"head" + data
    monkeypatch.setattr(disk, "_InPieces", lambda _path, _mode: io.FileIO("/dev/full", "w"))
    with pytest.raises(OSError, match="No space left"), disk.large_file(tmp_path / "other") as file:
        file.write(data)
