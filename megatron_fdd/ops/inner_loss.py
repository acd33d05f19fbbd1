"""The loss of several inner layers, with the gradient of its divergences and deltas computed in the forward pass.

A delta's gradient reaches a layer's logits through its log-sum-exp, and needs those of both its layers. Blocks of
tokens go through all layers in depth order: the logits of a layer are held until the next layer's log-sum-exp is known.
Then the gradient of its logits is one matrix, of divergence and deltas together, and takes one product with the head:
a layer costs three products (two of logits), and keeps one [N, D] for the backward pass. `linear_kl` and `delta_cosine`
multiply four times, or six, and keep three. The head is a constant.

Shapes: N this rank's tokens, n tokens of a block, R those of all ranks under sequence parallelism, T / D hidden width
of teacher / student.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fdd.ops.delta import delta_cosine_gradient
from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.head_grams import HeadGrams
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.inner_layers import (
    GivenLayer,
    InnerLayer,
    InnerTerms,
    LayerPass,
    LayerSums,
    SweptLayer,
    request_of,
)

__all__ = ["InnerLayer", "InnerTerms", "LayerSums", "inner_loss", "is_worth_it"]


def is_worth_it(heads: Heads, divergence: Divergence | None) -> bool:
    """Whether `inner_loss` is the way to the gradient of inner layers with these heads.

    On a CPU it takes as long as `linear_kl`. A trained head's gradient would be kept for all layers, and under a soft
    cap the delta is no quadratic form.
    """
    return (
        torch.is_grad_enabled()
        and not heads.student_WD.requires_grad
        and heads.student_extras.cap is None
        and heads.teacher_extras.cap is None
        and heads.implementation.chosen(heads.student_WD, divergence) == "triton"
    )


def inner_loss(
    layers: Sequence[InnerLayer], heads: Heads, grams: HeadGrams, terms: InnerTerms
) -> tuple[Tensor, list[LayerSums]]:
    """Add up divergences and deltas of layers in depth order, weighted; return the loss and the sums of each layer.

    Gradient flows from the loss to the features of the student and to the log-sum-exps that are given. Memory besides
    inputs and outputs: the logits of both models and two layers, together of as many numbers as `head_loss` holds, and
    for the backward pass one [N, D] a layer in the head's dtype. Not differentiable twice.

    Args:
        heads: constants, without soft caps.

    Collectives over `heads.shard.group` (one rank: none), all forward. For each block of tokens and layer whose logits
        are made: one all-gather of the packed statistics; divergences of two sweeps: one all-reduce of [2, R]; one
        all-reduce of the gradient [R, D] in the dtype that is kept. For each block and delta without sequence
        parallelism: one all-gather of [n / ranks, D + 2]. Sequence parallelism adds for each block and layer one
        all-gather each of teacher, student and weights ([n, 2]); the all-reduce of the gradient becomes a
        reduce-scatter.
    """
    with torch.no_grad():
        passes = [_layer_pass(layer, heads, terms) for layer in layers]
        for rows in request_of(heads, None).blocks(len(terms.weights_N)):
            for before, each in itertools.pairwise([None, *passes]):
                assert each is not None
                each.begin(rows)
                if before is not None:
                    if each.layer.delta is not None:
                        _compare(before, each, grams, terms)
                    before.end()
            passes[-1].end()
        gradients = [gradient for each in passes for gradient in each.finish()]
        sums = [each.sums for each in passes]
        total = _weighted(layers, sums, terms.weights_N.new_zeros(()))
    inputs = [tensor for layer in layers for tensor in (layer.student_ND, *(layer.lse or ())[1:])]
    return _Known.apply(total, gradients, *inputs), sums


class _Known(torch.autograd.Function):
    """A number whose gradient for the inputs is given; None: an input has none."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # Not 0-dim: CUDA would round the factor to bf16 first.
        scaled = (
            None if each is None else (each * factor.view((1,) * each.ndim)).to(dtype)
            for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, *scaled


def _layer_pass(layer: InnerLayer, heads: Heads, terms: InnerTerms) -> LayerPass:
    return SweptLayer(layer, heads, terms) if layer.lse is None else GivenLayer(layer, terms)


def _compare(before: LayerPass, after: LayerPass, grams: HeadGrams, terms: InnerTerms) -> None:
    """Compute the delta between two layers for their block, and add its gradient to both."""
    rows, (earlier, later) = after.rows, (before.layer, after.layer)
    found = delta_cosine_gradient(
        later.teacher_NT[rows] - earlier.teacher_NT[rows],
        later.student_ND[rows] - earlier.student_ND[rows],
        after.lse[0] - before.lse[0],
        after.lse[1] - before.lse[1],
        grams,
    )
    after.add_value(1 - found.cosine_N)
    assert later.delta is not None
    weights_n = terms.weights_N[rows]
    factor_n = torch.where(weights_n > 0, -later.delta * weights_n, 0.0)
    by_student_nD, by_lse_n = found.by_student_ND * factor_n[:, None], found.by_lse_N * factor_n
    after.add(by_student_nD, by_lse_n)
    if not terms.detaches_previous:
        before.add(-by_student_nD, -by_lse_n)


def _weighted(layers: Sequence[InnerLayer], sums: Sequence[LayerSums], nothing: Tensor) -> Tensor:
    """Add up all sums, each times its factor."""
    total = nothing
    for layer, each in zip(layers, sums, strict=True):
        for factor, value in ((layer.divergence, each.divergence), (layer.delta, each.delta)):
            if factor is not None and value is not None:
                total = total + value * factor
    return total
