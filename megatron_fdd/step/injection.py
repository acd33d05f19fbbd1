"""The loss of an inner pipeline stage, attached to the stage's own output where its activations are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


def attach_loss(output: Tensor, loss: Tensor, grad_scale: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return `output`, unchanged; its backward pass also starts the backward pass of `loss`.

    Args:
        output: the tensor that the stage sends on.
        loss: scalar; it receives the gradient `loss_scale`, as on the last stage.
        grad_scale: the model config's `grad_scale_func`.

    Megatron frees a stage's output once it is sent, and refuses views; the last line therefore makes it no view.
    """
    attached = _Attach.apply(output, loss, loss_scale(grad_scale, loss.device))
    return make_viewless_tensor(attached, requires_grad=True, keep_graph=True)


def loss_scale(grad_scale: Callable[[Tensor], Tensor] | None, device: torch.device) -> Tensor:
    """Return the factor by which Megatron's schedule multiplies the last stage's loss before backward, 0-dim."""
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
