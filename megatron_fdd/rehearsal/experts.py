"""Stand-ins for what Megatron's token dispatcher expects of GPUs and NCCL.

gloo wants sizes as numbers, and parts of equal size in an all-gather and a reduce-scatter; its all-to-all does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch.distributed import ProcessGroup

Collective = Callable[..., Tensor]


def install_experts() -> None:
    """Replace the dispatcher's way of reading sizes, and the two collectives. To be called once."""
    for module, name, stand_in in (
        (token_dispatcher, "maybe_move_tensor_to_cpu", lambda _original: to_host),
        (mappings, "_gather_along_first_dim", uneven_gather),
        (mappings, "_reduce_scatter_along_first_dim", uneven_reduce_scatter),
    ):
        assert hasattr(module, name), f"{module}.{name}: not the Megatron that this was written for"
        setattr(module, name, stand_in(getattr(module, name)))


def to_host(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's `maybe_move_tensor_to_cpu`, which leaves a tensor that is on the host already a tensor."""
    return value.numpy() if as_numpy and isinstance(value, Tensor) else value


def uneven_gather(original: Collective) -> Collective:
    """Megatron's gather along the first dimension; with sizes given, one all-to-all over `group`."""

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
    """Megatron's reduce-scatter along the first dimension; with sizes given, one all-to-all over `group`."""

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
