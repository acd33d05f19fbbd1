"""A loss that lives on an inner pipeline stage: injected where its activation is, by the stage's own output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


def attach_loss(output: Tensor, loss: Tensor, grad_scale: Callable[[Tensor], Tensor] | None) -> Tensor:
    """`output`, unchanged, whose backward pass also starts `loss`'s.

    Args:
        output: what the stage sends on.
        loss: scalar; it receives the gradient `loss_scale`, as on the last stage.
        grad_scale: the model config's `grad_scale_func`.

    Megatron frees stage outputs once they are sent and refuses views, hence the last line.
    """
    attached = _Attach.apply(output, loss, loss_scale(grad_scale, loss.device))
    return make_viewless_tensor(attached, requires_grad=True, keep_graph=True)


def loss_scale(grad_scale: Callable[[Tensor], Tensor] | None, device: torch.device) -> Tensor:
    """What Megatron's schedule multiplies the loss of the last stage with before the backward pass, 0-dim."""
    scale = torch.ones((), device=device)
    return scale if grad_scale is None else grad_scale(scale)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return gradient, scale.to(ctx.loss_dtype), None
