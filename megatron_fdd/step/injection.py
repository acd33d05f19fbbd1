"""The loss of an inner pipeline stage, attached to the stage's own output where its activations are."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


def attach_loss(output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """Return `output`, unchanged; its backward pass also starts the backward pass of `loss`.

    Args:
        output: the tensor that the stage sends on.
        loss: scalar.
        scale: the gradient of `loss`, 0-dim; on the last stage Megatron's schedule multiplies the loss by it.

    Megatron frees a stage's output once it is sent, and refuses views; the last line therefore makes it no view.
    """
    attached = _Attach.apply(output, loss, scale)
    return make_viewless_tensor(attached, requires_grad=True, keep_graph=True)


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
