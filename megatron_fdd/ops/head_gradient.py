"""The two destinations of a trained head's gradient: autograd, or directly Megatron's gradient buffer.

A parameter in Megatron's DDP has a `main_grad` (float32, unless gradients are reduced in bf16) that lives as long as
the model. Parts are added to it directly, so that several micro-batches are not rounded to bf16 one by one. Autograd
then gets a dummy, as it does from Megatron's own fused layers: DDP's hook asserts that there is a gradient, does not
add it when `grad_added_to_main_grad` is set, and does add it when the parameter is also an embedding
(`zero_out_wgrad`; the dummy is then zero). Every contribution to a parameter must take this path.

Shapes: W rows of the head shard, D the student's width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class HeadGradient:
    """A head's gradient while it is collected: the caller adds to `sum_WD`, then passes `finish()` to autograd."""

    def __init__(self, head_WD: Tensor, *, parts: int) -> None:
        """Prepare the sum. `parts`: how many additions a row receives; several are summed in float32."""
        self._head_WS = head_WD
        if has_main_grad(head_WD):
            self.sum_WD: Tensor = head_WD.main_grad  # type: ignore[attr-defined]
        else:
            wide = parts > 1 and head_WD.dtype != torch.float64
            self.sum_WD = torch.zeros_like(head_WD, dtype=torch.float32 if wide else head_WD.dtype)

    def finish(self) -> Tensor:
        """Return the gradient for autograd, [W, D] in the head's dtype."""
        if has_main_grad(self._head_WS):
            return dummy(self._head_WS)
        return self.sum_WD.to(self._head_WS.dtype)


def deliver(head_WD: Tensor, gradient_WD: Tensor, factor: Tensor) -> Tensor:
    """Hand over factor * gradient, which is computed already; return what autograd gets. `factor` is 0-dim."""
    if not has_main_grad(head_WD):
        # Written in the head's dtype at once. Not 0-dim: CUDA would first round a 0-dim factor to that dtype.
        return torch.mul(gradient_WD, factor.view(1, 1), out=torch.empty_like(head_WD))
    head_WD.main_grad.addcmul_(gradient_WD, factor)  # type: ignore[attr-defined]
    return dummy(head_WD)


def collected(head_WD: Tensor) -> Tensor:
    """Return the same head, whose gradient from autograd's own operations is handed over in the same way."""
    return _Collected.apply(head_WD) if head_WD.requires_grad else head_WD


def has_main_grad(head_WD: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the head is a parameter in Megatron's DDP whose gradient is summed in `dtype` (None: in any)."""
    if not (hasattr(head_WD, "grad_added_to_main_grad") and hasattr(head_WD, "main_grad")):
        return False
    return dtype is None or head_WD.main_grad.dtype == dtype


def dummy(head_WD: Tensor) -> Tensor:
    """Return what autograd gets for a head whose gradient is in its `main_grad`, [W, D]; tell DDP so.

    All heads of a shape share the memory, which stays: nobody reads such a gradient, or it is zero.
    """
    head_WD.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    shared_WD = _shared(head_WD.shape, head_WD.dtype, head_WD.device)
    # A view of its own, because autograd takes a gradient that only one holds as it is, and copies others.
    own_WD = shared_WD.detach()
    return own_WD.zero_() if getattr(head_WD, "zero_out_wgrad", False) else own_WD


@functools.cache
def _shared(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class _Collected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head_WD: Tensor) -> Tensor:
        ctx.head_WD = head_WD
        return head_WD.view_as(head_WD)

    @staticmethod
    def backward(ctx: Any, gradient_WD: Tensor) -> Tensor:
        return deliver(ctx.head_WD, gradient_WD, gradient_WD.new_ones(()))
