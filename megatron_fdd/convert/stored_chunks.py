"""The tensors of a `torch_dist` checkpoint in the chunks in which its ranks saved them, read from several threads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_fdd.convert.mapped import mapped


class StoredChunks:
    """The chunks of a checkpoint's tensors.

    Megatron's own loading plans every read against all chunks of a tensor. Experts are one tensor with a chunk for
    each, so that reading them one by one would take the square of their number.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        metadata = CachedMetadataFileSystemReader(path).read_metadata()
        self._places = metadata.storage_data
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

    def read(self, piece: ShardedTensor) -> Tensor:
        """Return a piece of a tensor on the CPU, from any thread; what lies outside the stored tensor is 0.

        A piece that was saved as it is needed is mapped, and others are copied out of chunks that are.

        Raises:
            ValueError: chunks are missing. Whatever torch raises for damaged bytes.
        """
        stored = self._tensors[piece.key]
        wanted = ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size(piece.local_shape))
        same = self._at.get((piece.key, tuple(piece.global_offset)))
        chunks = [same] if same is not None and same.sizes == wanted.sizes else stored.chunks
        is_chunk = chunks is not stored.chunks
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
        if is_chunk:
            return self._chunk(items[0]).to(stored.properties.dtype)
        new = torch.empty if inside == math.prod(wanted.sizes) else torch.zeros
        data = new(wanted.sizes, dtype=stored.properties.dtype)
        for item in items:
            _narrowed(data, item.dest_offsets, item.lengths).copy_(self._chunk(item))
        return data

    def _chunk(self, item: ReadItem) -> Tensor:
        """Return a part of a chunk, mapped."""
        place = self._places[item.storage_index]
        path = self._path / place.relative_path
        with path.open("rb") as file:
            view = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
            # Nothing is read to the meta device; torch says at which byte the data begin.
            whole = torch.load(view, map_location="meta", weights_only=True)
            begin = getattr(whole.untyped_storage(), "_checkpoint_offset", None)
            if begin is None:  # before torch 2.11
                view.seek(0)
                whole = torch.load(view, map_location="cpu", weights_only=True)
        if begin is not None:
            raw = mapped(path, place.offset + begin, whole.untyped_storage().nbytes())
            whole = raw.view(whole.dtype).as_strided(whole.shape, whole.stride(), whole.storage_offset())
        return _narrowed(whole, item.storage_offsets, item.lengths)


def _narrowed(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return the part of a tensor with these offsets and lengths."""
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor
