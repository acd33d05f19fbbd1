"""The stand-ins for gloo's collectives over parts of unequal size, which gloo does not have."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

from tests.harness.ranks import distributed

SIZES = [2, 0, 3]


def part(rank: int) -> Tensor:
    """Return the rows of one rank, all different."""
    return torch.arange(SIZES[rank] * 4.0).view(-1, 4) + 100 * rank


@distributed(ranks=3)
def test_parts_of_unequal_size_are_gathered_and_their_gradients_added() -> None:
    mine = part(dist.get_rank()).requires_grad_()
    gathered = gather_from_sequence_parallel_region(
        mine, group=dist.group.WORLD, output_split_sizes=np.array(SIZES)
    )
    torch.testing.assert_close(gathered, torch.cat([part(rank) for rank in range(3)]), rtol=0, atol=0)
    (gathered * (dist.get_rank() + 1)).sum().backward()
    torch.testing.assert_close(mine.grad, torch.full_like(mine, 6.0), rtol=0, atol=0)


@distributed(ranks=3)
def test_a_sum_is_scattered_in_parts_of_unequal_size() -> None:
    rows = torch.cat([part(rank) for rank in range(3)]) * (dist.get_rank() + 1)
    rows.requires_grad_()
    mine = reduce_scatter_to_sequence_parallel_region(
        rows, group=dist.group.WORLD, input_split_sizes=np.array(SIZES)
    )
    torch.testing.assert_close(mine, 6 * part(dist.get_rank()), rtol=0, atol=0)
    (mine * (dist.get_rank() + 1)).sum().backward()
    wanted = torch.cat([torch.full((size, 4), rank + 1.0) for rank, size in enumerate(SIZES)])
    torch.testing.assert_close(rows.grad, wanted, rtol=0, atol=0)


@distributed(ranks=1)
def test_sizes_come_to_the_host_as_numbers() -> None:
    sizes = torch.tensor([3, 4])
    assert isinstance(token_dispatcher.maybe_move_tensor_to_cpu(sizes, as_numpy=True), np.ndarray)
    assert token_dispatcher.maybe_move_tensor_to_cpu(sizes) is sizes
    assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None
