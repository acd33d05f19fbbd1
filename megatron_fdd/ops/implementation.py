"""The choice of the implementation of the fused operations, and of the sizes of its tiles and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fdd.ops.divergence import Divergence, check_triton_function
from megatron_fdd.ops.vocab_tiles import row_stride

# Memory from which on a GPU holds twice the logits. What is sold with 80 GB reports some 79 GiB.
LARGE_GPU_BYTES = 75 * 2**30

ImplementationKind = Literal["auto", "reference", "torch", "triton"]


@dataclass(frozen=True, slots=True)
class Implementation:
    """Choices that change cost and rounding, never the meaning.

    Attributes:
        kind: reference materialises logits (to check the others with); torch streams over vocabulary tiles;
            triton streams too, with one kernel between a tile's products; auto is triton on a GPU, except for float64
            and for a divergence without a Triton function, else torch.
        tile_size: columns of the vocabulary that exist at a time; None: 4096 for triton; for torch 8192 on a GPU (each
            of its many small launches then has more to do), else 2048. Triton cuts larger tiles.
        block_rows: rows of tokens (of all tensor-parallel ranks together) that are swept at a time. A block's
            collectives run during the products of its neighbours.
        held_logits: logits of a model that exist at a time where they are kept for the gradient (`head_loss`); None:
            enough to keep the products busy, 2^28 on a GPU of 80 GB or more (1 GiB), 2^27 on a smaller one, else 2^24,
            but at least those of 256 tokens.
        skip_below: gradient products leave out tiles in which no probability reaches this (0: leave out none). This
            is an approximation: the loss stays exact, and every probability that is left out is smaller.
    """

    kind: ImplementationKind = "auto"
    tile_size: int | None = None
    block_rows: int = 8192
    held_logits: int | None = None
    skip_below: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(ImplementationKind):
            raise ValueError(
                f"implementation {self.kind!r} is unknown: use one of {get_args(ImplementationKind)}"
            )
        if not 0 <= self.skip_below < 1:
            raise ValueError(f"tiles are skipped below {self.skip_below}: it must be at least 0 and below 1")
        assert self.tile_size is None or self.tile_size > 0, f"tile_size {self.tile_size}"
        assert self.block_rows > 0, f"block_rows {self.block_rows}"

    def chosen(self, head: Tensor, divergence: Divergence | None) -> ImplementationKind:
        """Return the implementation that runs for a head and a divergence like these.

        Raises:
            ValueError: `kind` is triton, and the divergence has no Triton function.
        """
        has_triton = divergence is None or divergence.definition.triton is not None
        if self.kind == "auto":
            return "triton" if head.is_cuda and head.dtype != torch.float64 and has_triton else "torch"
        if self.kind == "triton" and divergence is not None:
            check_triton_function(divergence.kind)
        return self.kind

    def tile_columns(self, head: Tensor, divergence: Divergence | None) -> int:
        """Return `tile_size`, or the default of the implementation that runs."""
        return self._tile_columns(is_cuda=head.is_cuda, is_triton=self.chosen(head, divergence) == "triton")

    def held_rows(self, head: Tensor, *, gpu_bytes: int | None = None, layers: int = 1) -> int:
        """Return for how many tokens logits are held at a time, if those of so many layers are.

        Ranks of a tensor-parallel group need the same number, or their collectives do not meet. Padding rows count too.

        Args:
            gpu_bytes: `VocabShard.gpu_bytes`; None: the memory of the head's own device decides.
        """
        own = memory_of_gpu(head.device) if gpu_bytes is None else gpu_bytes
        return self._held_rows(layers * len(head), own)

    def most_logits(self, num_tokens: int, head_rows: int, *, gpu_bytes: int | None) -> int:
        """Return how many logits of a model exist at a time at most, of a tile or held; on a GPU those of triton.

        Args:
            num_tokens: of a micro-batch, all tensor-parallel ranks together.
            head_rows: rows of a rank's part of the head.
            gpu_bytes: the GPU's memory; None: a CPU.
        """
        is_cuda = gpu_bytes is not None
        tile = min(self._tile_columns(is_cuda=is_cuda, is_triton=is_cuda), head_rows)
        rows = min(num_tokens, self.block_rows)
        held = min(rows, self._held_rows(head_rows, gpu_bytes))
        return max(rows * row_stride(tile), held * row_stride(head_rows))

    def _tile_columns(self, *, is_cuda: bool, is_triton: bool) -> int:
        if self.tile_size is not None:
            return self.tile_size
        return 4096 if is_triton else 8192 if is_cuda else 2048

    def _held_rows(self, head_rows: int, gpu_bytes: int | None) -> int:
        if self.held_logits is not None:
            return max(1, self.held_logits // head_rows)
        if gpu_bytes is None:
            return max(256, 2**24 // head_rows)
        logits = 2**28 if gpu_bytes >= LARGE_GPU_BYTES else 2**27
        return max(256, logits // head_rows // 128 * 128)  # whole groups of rows of a product


def memory_of_gpu(device: torch.device) -> int | None:
    """Return the memory of a GPU; None for another device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def smallest_gpu_bytes(device: torch.device, group: ProcessGroup | None) -> int | None:
    """Return the memory of the smallest GPU of a tensor-parallel group; None on CPUs. Waits for the result.

    Collectives over `group`: one all-reduce of one number; one rank, or CPUs: none.
    """
    own = memory_of_gpu(device)
    if own is None or group is None or group.size() == 1:
        return own
    smallest = torch.tensor(own, dtype=torch.int64, device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
    return int(smallest.item())


DEFAULT_IMPLEMENTATION = Implementation()
