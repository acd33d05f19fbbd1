"""Which implementation of the fused operations runs, and how it cuts its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

KernelKind = Literal["auto", "reference", "torch", "triton"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The choices that change cost and rounding, never the meaning.

    Attributes:
        kind: reference materialises logits (to check the others with); torch streams over vocabulary tiles;
            triton does so in GPU kernels; auto is triton on a GPU, else torch.
        tile_size: columns of the vocabulary that exist at a time.
        chunk_rows: token rows (all tensor-parallel ranks' together) that are swept at a time. A chunk's
            collectives run during the products of its neighbours.
        held_logits: logits of a model that exist at a time where they stay for the gradient (`head_loss`); None
            for what keeps the products busy: 2^26 on a GPU (256 MiB), else 2^23.
        skip_below: gradient products leave out tiles in which no probability reaches this (0: none). An
            approximation: the loss stays exact, and of each token's probabilities those left out are smaller.
    """

    kind: KernelKind = "auto"
    tile_size: int = 2048
    chunk_rows: int = 8192
    held_logits: int | None = None
    skip_below: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(KernelKind):
            raise ValueError(f"kernels {self.kind!r} are unknown: use one of {get_args(KernelKind)}")
        if not 0 <= self.skip_below < 1:
            raise ValueError(f"tiles are skipped below {self.skip_below}: it must be at least 0 and below 1")
        assert self.tile_size > 0, f"tile_size {self.tile_size}"
        assert self.chunk_rows > 0, f"chunk_rows {self.chunk_rows}"

    def chosen(self, like: Tensor) -> KernelKind:
        """What runs for a tensor like this: Triton's kernels know no float64."""
        if self.kind == "auto":
            return "triton" if like.is_cuda and like.dtype != torch.float64 else "torch"
        return self.kind

    def held_rows(self, like: Tensor, num_columns: int) -> int:
        """Tokens whose logits are held at a time."""
        held = self.held_logits or (2**26 if like.is_cuda else 2**23)
        return max(1, held // max(1, num_columns))


DEFAULT_KERNELS = Kernels()
