"""Megatron's TransformerEngine attention, computed as a rehearsal computes the local one."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from megatron_fdd.host.rehearsal.attention import ContextAttention


def install_attention() -> None:
    """Replace the forward pass, which has kernels alone; what it is for a checkpoint stays."""
    initialize = TEDotProductAttention.__init__

    def initialize_both(self: Any, *arguments: Any, **keywords: Any) -> None:
        initialize(self, *arguments, **keywords)
        self._on_cpu = (ContextAttention(*arguments, **keywords),)  # in a tuple: not a module of this one

    def forward(self: Any, *arguments: Any, num_splits: int | None = None, **keywords: Any) -> Tensor:
        return self._on_cpu[0](*arguments, **keywords)

    TEDotProductAttention.__init__ = initialize_both
    TEDotProductAttention.forward = forward
