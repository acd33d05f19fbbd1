"""Pieces of a stored tensor: those that were saved so, others, those beyond its end, and missing ones."""

from __future__ import annotations

from pathlib import Path

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
        data = torch.full((rows, 4), torch.nan)
        chunks.read(_piece(data, first_row))
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
def test_a_missing_chunk(folder: Path) -> None:
    chunks = StoredChunks(folder)
    chunks._tensors["w"].chunks.clear()
    with pytest.raises(ValueError, match="chunks of w are missing; give"):
        chunks.read(_piece(torch.empty(1, 4), 1))
