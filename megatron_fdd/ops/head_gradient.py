"""Where the gradient of a trained head goes: to autograd, or straight into Megatron's gradient buffer.

Shapes: W rows of the head shard, S the student's width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HeadGradient:
    """Collects a head's gradient in `sum_WS`, to which the caller adds; then `finish` gives what autograd gets.

    A parameter in Megatron's DDP has a `main_grad` (float32, unless gradients are reduced in bf16) that lives as
    long as the model: parts are added to it directly, so that no tensor of the head's size is made for them and
    several micro-batches are not rounded to bf16 one by one. Autograd then gets a dummy, as from Megatron's own
    fused layers: DDP's hook asserts that there is a gradient, does not add it when
    `grad_added_to_main_grad` is set, and does add it when the parameter is also an embedding
    (`zero_out_wgrad`: then the dummy is zero). Every contribution to a parameter must come this way.
    """

    def __init__(self, head_WS: Tensor, *, parts: int) -> None:
        """`parts`: how many additions a row receives; several are summed in float32."""
        self._head_WS = head_WS
        self._is_fused = hasattr(head_WS, "grad_added_to_main_grad") and hasattr(head_WS, "main_grad")
        if self._is_fused:
            self.sum_WS: Tensor = head_WS.main_grad  # type: ignore[attr-defined]
        else:
            wide = parts > 1 and head_WS.dtype != torch.float64
            self.sum_WS = torch.zeros_like(head_WS, dtype=torch.float32 if wide else head_WS.dtype)

    def finish(self) -> Tensor:
        """The gradient for autograd, [W, S] in the head's dtype."""
        if not self._is_fused:
            return self.sum_WS.to(self._head_WS.dtype)
        self._head_WS.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if getattr(self._head_WS, "zero_out_wgrad", False):
            return torch.zeros_like(self._head_WS)
        return torch.empty_like(self._head_WS)
