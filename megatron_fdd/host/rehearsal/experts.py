"""Stand-ins for what Megatron's token dispatcher expects of GPUs and NCCL.

gloo needs sizes as numbers, and equal parts in an all-gather and a reduce-scatter, but not in an all-to-all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fdd.host.patches.table import current, replace

Collective = Callable[..., Tensor]


def install_experts() -> None:
    """Replace how the dispatcher reads sizes, and its two collectives. Call it once."""
    replace("megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu", to_host)
    for name, stand_in in (
        ("_gather_along_first_dim", uneven_gather),
        ("_reduce_scatter_along_first_dim", uneven_reduce_scatter),
    ):
        target = f"megatron.core.tensor_parallel.mappings.{name}"
        replace(target, stand_in(current(target)))


def to_host(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Do what Megatron's `maybe_move_tensor_to_cpu` does; a tensor that is on the host already stays a tensor."""
    return value.numpy() if as_numpy and isinstance(value, Tensor) else value


def uneven_gather(original: Collective) -> Collective:
    """Wrap Megatron's gather along the first dimension; with sizes, it is one all-to-all over `group`."""

    def gather(
        input_: Tensor,
        group: ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        output = input_.new_empty(sum(sizes), *input_.shape[1:])
        copies = torch.cat([input_] * group.size())
        dist.all_to_all_single(output, copies, sizes, [len(input_)] * group.size(), group=group)
        return output

    return gather


def uneven_reduce_scatter(original: Collective) -> Collective:
    """Wrap Megatron's reduce-scatter along the first dimension; with sizes, it is one all-to-all over `group`."""

    def reduce_scatter(
        input_: Tensor,
        group: ProcessGroup,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        own = sizes[group.rank()]
        parts = input_.new_empty(group.size() * own, *input_.shape[1:])
        dist.all_to_all_single(parts, input_.contiguous(), [own] * group.size(), sizes, group=group)
        return parts.view(group.size(), own, *input_.shape[1:]).sum(0)

    return reduce_scatter
