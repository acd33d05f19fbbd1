"""The tensors of a `torch_dist` checkpoint in the chunks in which its ranks saved them, read from several threads."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


class StoredChunks:
    """The chunks of a checkpoint's tensors.

    Megatron's own loading plans every read against all chunks of a tensor. Experts are one tensor with a chunk for
    each, so that reading them one by one would take the square of their number.
    """

    def __init__(self, path: Path) -> None:
        self._reader = CachedMetadataFileSystemReader(path)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._at = {
            (key, tuple(chunk.offsets)): chunk
            for key, entry in self._tensors.items()
            for chunk in entry.chunks
        }

    def read(self, piece: ShardedTensor) -> None:
        """Fill the data of a piece of a tensor; what lies outside the stored tensor is 0.

        Raises:
            ValueError: chunks are missing. Whatever torch raises for damaged bytes.
        """
        assert piece.data is not None
        stored = self._tensors[piece.key]
        wanted = ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size(piece.local_shape))
        same = self._at.get((piece.key, tuple(piece.global_offset)))
        chunks = [same] if same is not None and same.sizes == wanted.sizes else stored.chunks
        items = create_read_items_for_chunk_list(
            piece.key, dataclasses.replace(stored, chunks=chunks), [wanted]
        )
        ends = (
            min(offset + length, size)
            for offset, length, size in zip(wanted.offsets, wanted.sizes, stored.size, strict=True)
        )
        inside = math.prod(max(end - offset, 0) for end, offset in zip(ends, wanted.offsets, strict=True))
        if sum(math.prod(item.lengths) for item in items) != inside:
            raise ValueError(f"chunks of {piece.key} are missing; give another checkpoint")
        if inside < piece.data.numel():
            piece.data.zero_()
        self._reader.read_data(LoadPlan(items), _Target(piece.data))


class _Target(DefaultLoadPlanner):
    """A planner that has one tensor to be filled."""

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self._data = data

    def lookup_tensor(self, _index: object) -> Tensor:
        return self._data

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the tensor is a view of the data."""
