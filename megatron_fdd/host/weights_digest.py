"""A hash of all of a model's weights that does not depend on its layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

# Elements that are widened to 8 bytes at once.
_AT_ONCE = 1 << 22
# splitmix64, a public-domain generator: its step and the factors of its two rounds.
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def weights_digest(model: MegatronModule, groups: ProcessGroupCollection) -> str:
    """Return a hash of every element of a model's weights, rounded to float32, with its name and place in it.

    The sum, modulo 2**64, of each element's bits times a number for each index of its place. So shards are added up,
    and rows of zeros, which pad a vocabulary, change nothing. It tells models apart, and is no proof against forgery.

    Collectives: one all-reduce of a number over all ranks.
    """
    sharded: Any = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    apply_factories(sharded)
    total = torch.zeros(1, dtype=torch.int64, device=torch.cuda.current_device())
    for entry in nested_values(sharded):
        if isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id) and entry.data is not None:
            total += _sum_of(entry).to(total.device)
    dist.all_reduce(total)
    return f"{int(total) % 2**64:016x}"


def _sum_of(entry: ShardedTensor) -> Tensor:
    """Return a shard's part of the sum, int64."""
    data = entry.data.detach()
    factors = [
        _numbers(f"{entry.key} {axis}", first, length, data.device)
        for axis, (first, length) in enumerate(zip(entry.global_offset, _lengths(entry), strict=True))
    ]
    ahead = entry.prepend_axis_num
    outer = torch.ones((), dtype=torch.int64, device=data.device)
    for factor in factors[:ahead]:
        outer = outer * factor[0]
    inner = factors[ahead:]
    if not inner:
        return outer * _bits(data)
    rows = max(1, _AT_ONCE // max(1, data[0].numel())) if len(data) else 1
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, len(data), rows):
        part = _bits(data[start : start + rows])
        for factor in reversed(inner[1:]):
            part = (part * factor).sum(-1)
        total += (part * inner[0][start : start + rows]).sum()
    return outer * total


def _lengths(entry: ShardedTensor) -> tuple[int, ...]:
    return (1,) * entry.prepend_axis_num + tuple(entry.data.shape)


def _bits(values: Tensor) -> Tensor:
    return values.float().contiguous().view(torch.int32).long()


def _numbers(seed: str, first: int, length: int, device: torch.device) -> Tensor:
    """Return an odd number of 64 bits for each index of an axis from `first` on."""
    with np.errstate(over="ignore"):
        mixed = np.arange(first, first + length, dtype=np.uint64) + np.uint64(
            xxhash.xxh3_64_intdigest(seed.encode())
        )
        mixed = mixed * np.uint64(_STEP)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_FIRST)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_SECOND)
        mixed = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(mixed.view(np.int64)).to(device)
