"""Pieces of a stored tensor: those that were saved so, others, those beyond its end, and missing ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_fdd.convert import stored_chunks
from megatron_fdd.convert.stored_chunks import StoredChunks

STORED = torch.arange(12.0).view(3, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save({"w": STORED}, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def _piece(data: Tensor, first_row: int) -> ShardedTensor:
    return ShardedTensor(
        "w", data, data.dtype, tuple(data.shape), (99, 4), (first_row, 0), (1, 1), allow_shape_mismatch=True
    )


@pytest.mark.filterwarnings("ignore")
def test_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = StoredChunks(folder)
    for first_row, rows in ((0, 3), (1, 1), (2, 2), (0, 4)):
        data = chunks.read(_piece(torch.empty(rows, 4), first_row))
        wanted = torch.cat([STORED[first_row:], torch.zeros(9, 4)])[:rows]
        assert torch.equal(data, wanted), first_row
    looked_at = []

    def counted(key: str, entry: object, wanted: list[ChunkStorageMetadata]) -> object:
        looked_at.append(len(entry.chunks))
        return create_read_items_for_chunk_list(key, entry, wanted)

    monkeypatch.setattr(stored_chunks, "create_read_items_for_chunk_list", counted)
    two = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((1, 4))) for row in (1, 2)]
    chunks._tensors["w"].chunks += two  # as a tensor of experts has them
    chunks._at[("w", (1, 0))] = two[0]
    with pytest.raises(KeyError):  # its bytes are not there
        chunks.read(_piece(torch.empty(1, 4), 1))
    assert looked_at == [1]


@pytest.mark.filterwarnings("ignore")
def test_a_piece_that_was_saved_so_is_mapped(folder: Path) -> None:
    """It takes no memory of its own, and leaves together with its pages."""
    chunks, maps = StoredChunks(folder), Path("/proc/self/maps")
    whole, part = chunks.read(_piece(torch.empty(3, 4), 0)), chunks.read(_piece(torch.empty(1, 4), 1))
    assert torch.equal(whole, STORED)
    assert maps.read_text().count(str(folder)) == 1, "the part is a copy"
    del whole
    assert str(folder) not in maps.read_text()
    assert torch.equal(part, STORED[1:2])


@pytest.mark.filterwarnings("ignore")
def test_what_torch_stored_in_other_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that follow one another, a file behind other bytes, and a torch that does not tell where data begin."""
    checkpoint.save(
        {"other": torch.ones(1), "w": STORED.T.contiguous().T}, checkpoint_id=tmp_path, no_dist=True
    )
    chunks, piece = StoredChunks(tmp_path), _piece(torch.empty(3, 4), 0)
    assert torch.equal(chunks.read(piece), STORED)
    load = torch.load

    def without_place(*arguments: Any, **options: Any) -> Tensor:
        return load(*arguments, **options).clone()

    monkeypatch.setattr(torch, "load", without_place)
    assert torch.equal(chunks.read(piece), STORED)


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_has_become_shorter(folder: Path) -> None:
    chunks = StoredChunks(folder)
    (path,) = folder.glob("*.distcp")
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(Exception, match="central directory"):
        chunks.read(_piece(torch.empty(3, 4), 0))


@pytest.mark.filterwarnings("ignore")
def test_a_missing_chunk(folder: Path) -> None:
    chunks = StoredChunks(folder)
    chunks._tensors["w"].chunks.clear()
    with pytest.raises(ValueError, match="chunks of w are missing; give"):
        chunks.read(_piece(torch.empty(1, 4), 1))
