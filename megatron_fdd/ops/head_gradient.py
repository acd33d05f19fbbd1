"""Where the gradient of a trained head goes: to autograd, or straight into Megatron's gradient buffer.

A parameter in Megatron's DDP has a `main_grad` (float32, unless gradients are reduced in bf16) that lives as long as
the model: parts are added to it directly, so that several micro-batches are not rounded to bf16 one by one. Autograd
then gets a dummy, as from Megatron's own fused layers: DDP's hook asserts that there is a gradient, does not add it
when `grad_added_to_main_grad` is set, and does add it when the parameter is also an embedding (`zero_out_wgrad`: then
the dummy is zero). Every contribution to a parameter must come this way.

Shapes: W rows of the head shard, S the student's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HeadGradient:
    """Collects a head's gradient in `sum_WS`, to which the caller adds; then `finish` gives what autograd gets."""

    def __init__(self, head_WS: Tensor, *, parts: int) -> None:
        """`parts`: how many additions a row receives; several are summed in float32."""
        self._head_WS = head_WS
        if has_main_grad(head_WS):
            self.sum_WS: Tensor = head_WS.main_grad  # type: ignore[attr-defined]
        else:
            wide = parts > 1 and head_WS.dtype != torch.float64
            self.sum_WS = torch.zeros_like(head_WS, dtype=torch.float32 if wide else head_WS.dtype)

    def finish(self) -> Tensor:
        """The gradient for autograd, [W, S] in the head's dtype."""
        if has_main_grad(self._head_WS):
            return dummy(self._head_WS)
        return self.sum_WS.to(self._head_WS.dtype)


def deliver(head_WS: Tensor, gradient_WS: Tensor, factor: Tensor) -> Tensor:
    """Hand over factor * gradient, computed before; returns what autograd gets. `factor` is 0-dim."""
    if not has_main_grad(head_WS):
        # Written in the head's dtype at once. Not 0-dim: CUDA would round the factor to that first.
        return torch.mul(gradient_WS, factor.view(1, 1), out=torch.empty_like(head_WS))
    head_WS.main_grad.addcmul_(gradient_WS, factor)  # type: ignore[attr-defined]
    return dummy(head_WS)


def collected(head_WS: Tensor) -> Tensor:
    """The same head, whose gradient from autograd's own operations is handed over in the same way."""
    return _Collected.apply(head_WS) if head_WS.requires_grad else head_WS


def has_main_grad(head_WS: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether it is a parameter in Megatron's DDP, and its gradient is summed in `dtype`."""
    if not (hasattr(head_WS, "grad_added_to_main_grad") and hasattr(head_WS, "main_grad")):
        return False
    return dtype is None or head_WS.main_grad.dtype == dtype


def dummy(head_WS: Tensor) -> Tensor:
    """What autograd gets for a head whose gradient is in its `main_grad`, [W, S]; also tells DDP so."""
    head_WS.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(head_WS, "zero_out_wgrad", False):
        return torch.zeros_like(head_WS)
    return torch.empty_like(head_WS)


class _Collected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head_WS: Tensor) -> Tensor:
        ctx.head_WS = head_WS
        return head_WS.view_as(head_WS)

    @staticmethod
    def backward(ctx: Any, gradient_WS: Tensor) -> Tensor:
        return deliver(ctx.head_WS, gradient_WS, gradient_WS.new_ones(()))
