"""Megatron's TransformerEngine attention, computed in the way a rehearsal computes local attention."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from megatron_fdd.host.latent_attention import of_any_width
from megatron_fdd.host.rehearsal.attention import ContextAttention


def install_attention() -> None:
    """Replace the forward pass, which has only kernels; its part in a checkpoint stays."""
    initialize = TEDotProductAttention.__init__
    core = of_any_width(ContextAttention)

    def initialize_both(self: Any, *arguments: Any, **keywords: Any) -> None:
        initialize(self, *arguments, **keywords)
        self._on_cpu = (core(*arguments, **keywords),)  # in a tuple, it is no submodule

    def forward(self: Any, *arguments: Any, num_splits: int | None = None, **keywords: Any) -> Tensor:
        return self._on_cpu[0](*arguments, **keywords)

    TEDotProductAttention.__init__ = initialize_both
    TEDotProductAttention.forward = forward
