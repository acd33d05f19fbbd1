"""The writer of Megatron's format with one tensor in memory at a time, which is read just before it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_fdd.convert.checkpoint_entries import Pieces, place_of
from megatron_fdd.host.disk import flushed_behind, large_file, told_by_torchs_writer

Reader = Callable[[str], Sequence[Tensor]]
"""Name of a parameter -> its value on the CPU, in blocks that follow one another in dim 0."""


class StreamingSave(TorchDistSaveShardedStrategy):
    """Megatron's format through torch's writer; Megatron's own writer first collects everything that a rank writes."""

    def __init__(self, weights: Pieces, read: Reader) -> None:
        super().__init__()
        self._weights = weights
        self._read = read

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(flat),
            storage_writer=_StreamingWriter(checkpoint_dir),
            planner=_LazyPlanner(self._weights, self._read),
        )


class _StreamingWriter(torch_checkpoint.FileSystemWriter):
    """A writer of one file per rank with one tensor in memory; torch's own keeps every tensor until the file closes."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        if plan.items:
            file = large_file(Path(self.path, name))
            with told_by_torchs_writer(), file as stream, flushed_behind(stream), _without_crc32():
                settings = (name, self.serialization_format)
                for item in plan.items:  # unnamed data, or it would live while the next is read
                    results.append(
                        _write_item(self.transforms, stream, planner.resolve_data(item), item, *settings)
                    )
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Let torch write no CRC-32, which takes as long as writing, and which no reader looks at.

    torch looks at none when it loads, and no program for archives reads a file of many. The file's own sums, and those
    of tensors, find damage.
    """
    chosen = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(chosen)


class _LazyPlanner(MCoreSavePlanner):
    """A planner that reads each parameter just before it is written, in the model's order."""

    def __init__(self, weights: Pieces, read: Reader) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights = weights
        self._read = read
        self._current = ""
        self._data_of: dict[tuple[Any, ...], Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=sorted(plan.items, key=self._position))
        return self.plan

    def _position(self, item: WriteItem) -> int:
        return -1 if item.type == WriteItemType.BYTE_IO else self._weights.parameter_of(item)[0]

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        _, name = self._weights.parameter_of(write_item)
        if self._current != name:
            self._data_of.clear()  # free one parameter before reading the next
            pieces = self._weights.of(name, self._read(name))
            self._current, self._data_of = name, {place_of(piece): piece.data for piece in pieces}
        data = self._data_of.pop(place_of(write_item))
        # A view would be stored with its whole base tensor; numpy's array of its bytes is one by itself.
        raw = data.contiguous().reshape(-1).view(torch.uint8).numpy()
        return torch.from_numpy(raw).view(data.dtype).view(data.shape)
