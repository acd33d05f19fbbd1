"""Divergence and cross-entropy of a head, summed over tokens, with the gradient computed in the forward pass.

`linear_kl` does not know in advance which gradient its backward pass gets for each token. For it, `linear_kl` sweeps a
trained head again, or for a constant head keeps two tensors of the student's size. Where the loss is a sum with known
weights, the gradient of a block of tokens can follow as soon as its logits and their normalisers exist. That is the
least possible number of products: two for the logits, one for the hidden states, one for a trained head.

Shapes: N this rank's tokens, R all tokens of the tensor-parallel group under sequence parallelism (else N), T / D
hidden width of teacher / student, W rows of this rank's head shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fdd.ops.blocks import LinearKL, TokenBlock, finished_blocks
from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.head_gradient import deliver, dummy, has_main_grad
from megatron_fdd.ops.heads import Heads, Model
from megatron_fdd.ops.kl_gradients import Upstream, label_slope, normalisers_of
from megatron_fdd.ops.reference import reference_linear_kl
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.vocab_shard import Pending
from megatron_fdd.ops.vocab_tiles import statistics_dtype

# Relative tolerance between the factor that is given in advance and the one that the backward pass sees.
_ROUNDING = 1e-3


class HeadLoss(NamedTuple):
    """Sums over this rank's tokens, 0-dim float32 (float64 for float64); only the loss carries gradient.

    Attributes:
        loss: both sums, weighted as `LossWeights` says.
        divergence: sum over tokens, each with its weight, the factor temperature**2 included; None if not asked for.
        cross_entropy: the same sum over tokens with a label; None if not asked for.
    """

    loss: Tensor
    divergence: Tensor | None
    cross_entropy: Tensor | None


@dataclass(frozen=True, slots=True)
class LossWeights:
    """The weight of each token in a sum, and of each sum in the loss.

    Attributes:
        divergence_N, entropy_N: float32. A token of weight 0 contributes exactly 0 to the sums, whatever it holds; to
            the gradients, if its features are finite.
        divergence, entropy: the loss is divergence * the sum of divergences + entropy * the sum of cross-entropies.
        factor: the gradient that the loss will get, one number, if it is known before the backward pass. A head with
            a float32 `main_grad` then gets its gradient in the forward pass, and no [W, D] is kept for the backward
            pass.
    """

    divergence_N: Tensor
    entropy_N: Tensor
    divergence: float
    entropy: float
    factor: Tensor | None = None


def head_loss(
    teacher_NT: Tensor | None,
    student_ND: Tensor,
    heads: Heads,
    *,
    divergence: Divergence | None,
    labels_N: Tensor | None,
    weights: LossWeights,
) -> HeadLoss:
    """Sum the divergence of two linear heads and the student's cross-entropy over tokens, as `weights` says.

    Gradient flows from the loss to the student's hidden states and, if it requires one, head; never to the teacher.
    The two sums are for the log and carry no gradient. Memory besides inputs and outputs: two buffers of
    `implementation.held_logits` numbers, and for the backward pass [N, D] and, for a trained head whose gradient is
    not yet in its `main_grad` (`weights.factor`), [W, D] in float32. Not differentiable twice.

    Args:
        teacher_NT: None: no teacher (`divergence` must then be None).
        divergence: None: no divergence, and the teacher is ignored.
        labels_N: ids of the whole vocabulary; negative: no label. Beyond the vocabulary: the sum is NaN. None: no
            cross-entropy.

    Collectives over `heads.shard.group` (one rank: none), all forward. For each block of tokens: one all-gather of the
        packed statistics ([R] times 5 for fkl and rkl, else 4, without a teacher 2; plus 1 with labels, and 2 more at
        a temperature other than 1); divergences of two sweeps (all but fkl and rkl): one all-reduce of [2, R]; one
        all-reduce of the gradient [R, D] in the student's dtype. Sequence parallelism adds one all-gather
        each of teacher, student and labels, and once one of [N, 2]; the all-reduce of the gradient becomes a
        reduce-scatter.
    """
    teacher, student = heads.models(None if divergence is None else teacher_NT, student_ND)
    assert divergence is None or teacher is not None, "a divergence needs a teacher"
    assert divergence is not None or labels_N is not None, "nothing is asked for"
    implementation = heads.implementation
    has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in student)
    held_rows = implementation.held_rows(heads.student_WD, gpu_bytes=heads.shard.gpu_bytes)
    request = Request(
        shard=heads.shard,
        divergence=divergence,
        needs_lse=False,
        has_labels=labels_N is not None,
        implementation=implementation,
        body_gradient=False,
        head_gradient=has_gradient,
        held_rows=held_rows if has_gradient else None,
        teacher_extras=heads.teacher_extras,
        student_extras=heads.student_extras,
    )
    if implementation.chosen(heads.student_WD, divergence) == "reference":
        outputs = LinearKL(*reference_linear_kl(request, teacher, student, labels_N))
        sums = _sums(outputs, weights, slice(None))
        return HeadLoss(_loss(sums, weights), *(None if each is None else each.detach() for each in sums))
    return HeadLoss(*_HeadLoss.apply(*student, teacher, labels_N, weights, request))


class _HeadLoss(torch.autograd.Function):
    """Gradient for the first two inputs, the student's, of the first output. Outputs: HeadLoss's fields."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        student_head_WD: Tensor,
        teacher: Model | None,
        labels_N: Tensor | None,
        weights: LossWeights,
        request: Request,
    ) -> tuple[Tensor | None, ...]:
        dtype = statistics_dtype(student_ND)
        stacked = _stack_weights(request, weights, dtype)
        head_gradient_WD, ctx.adds_at_once = None, False
        if request.head_gradient and ctx.needs_input_grad[1]:  # needs_input_grad is set in evaluation too
            ctx.adds_at_once = weights.factor is not None and has_main_grad(student_head_WD, dtype)
            if ctx.adds_at_once:
                head_gradient_WD = student_head_WD.main_grad  # type: ignore[attr-defined]
            else:
                head_gradient_WD = torch.zeros_like(student_head_WD, dtype=dtype)
        parts: list[tuple[Tensor | None, ...]] = []
        reductions: list[Pending] = []
        for block in finished_blocks(request, teacher, (student_ND, student_head_WD), labels_N):
            parts.append(_sums(block.outputs(request), weights, block.swept.rows))
            if request.head_gradient:
                gradient_RD = _block_gradient(request, block, stacked, head_gradient_WD)
                reductions.append(request.shard.start_reduce(gradient_RD.to(student_ND.dtype)))
        if reductions:
            ctx.head_WD, ctx.factor = student_head_WD, weights.factor
            kept_WD = None if ctx.adds_at_once else head_gradient_WD
            ctx.save_for_backward(torch.cat([part.wait() for part in reductions]), kept_WD)
        sums = [None if each[0] is None else torch.stack(each).sum() for each in zip(*parts, strict=True)]
        ctx.mark_non_differentiable(*(each for each in sums if each is not None))
        return _loss(sums, weights), *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, *_of_sums: None) -> tuple[Tensor | None, ...]:
        gradient_ND, head_gradient_WD = ctx.saved_tensors
        if ctx.factor is not None:
            factor = factor / ctx.factor.reshape(())  # the gradients have ctx.factor already
            # Where the factor is not finite, Megatron stops the step.
            is_told = ((factor - 1).abs() < _ROUNDING) | ~factor.isfinite()
            torch._assert_async(is_told, "the loss gets another gradient than LossWeights.factor")
        gradient_head = None
        if ctx.adds_at_once:
            gradient_head = dummy(ctx.head_WD)
        elif head_gradient_WD is not None:
            gradient_head = deliver(ctx.head_WD, head_gradient_WD, factor)
        # Not 0-dim: CUDA would round the factor to bf16 first.
        scaled_ND = torch.mul(gradient_ND, factor.view(1, 1), out=torch.empty_like(gradient_ND))
        return scaled_ND, gradient_head, None, None, None, None


def _block_gradient(
    request: Request, block: TokenBlock, stacked: Tensor, head_gradient_WD: Tensor | None
) -> Tensor:
    """Return this rank's part of the loss's gradient for the hidden states, [R, D]; add the head's."""
    divergence_R, entropy_R = stacked[:, block.swept.rows].flatten(0, 1).unbind(1)
    labels_R = block.swept.labels_R
    if labels_R is not None:
        entropy_R = entropy_R.masked_fill(labels_R < 0, 0.0)
    slope_R = label_slope(request, block.statistics, labels_R)
    label_R = entropy_R if slope_R is None else entropy_R * slope_R
    upstream = Upstream(divergence_R * request.temperature, entropy_R, label_R)
    normalisers = normalisers_of(request, block.statistics, block.second)
    return block.swept.sweeps.gradients(upstream, normalisers, labels_R, head_gradient_WD)


def _stack_weights(request: Request, weights: LossWeights, dtype: torch.dtype) -> Tensor:
    """Stack every rank's weights, [ranks, N, 2]. Collectives: one all-gather under sequence parallelism."""
    scaled = (weights.divergence_N * weights.divergence, weights.entropy_N * weights.entropy)
    stacked = torch.stack(scaled, dim=1).to(dtype)
    if weights.factor is not None:
        stacked = stacked * weights.factor.to(dtype)
    return request.shard.start_stack(stacked).wait() if request.shard.splits_tokens else stacked[None]


def _sums(outputs: LinearKL, weights: LossWeights, rows: slice) -> tuple[Tensor | None, ...]:
    """Sum divergence and cross-entropy over rows, each with its weight."""
    pairs = (
        (outputs.divergence_N, weights.divergence_N[rows]),
        (outputs.cross_entropy_N, weights.entropy_N[rows]),
    )
    return tuple(None if value_N is None else masked_sum(value_N, weight_N) for value_N, weight_N in pairs)


def _loss(sums: Sequence[Tensor | None], weights: LossWeights) -> Tensor:
    """Add the two sums over all rows, each with its weight."""
    pairs = zip(sums, (weights.divergence, weights.entropy), strict=True)
    parts = [each * weight for each, weight in pairs if each is not None]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def masked_sum(value_N: Tensor, weight_N: Tensor) -> Tensor:
    """Sum over the rows that count. A masked row contributes exactly 0, whatever it holds."""
    return torch.where(weight_N > 0, value_N * weight_N, 0.0).sum()
