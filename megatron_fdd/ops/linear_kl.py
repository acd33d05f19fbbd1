"""Divergence, log-sum-exp and cross-entropy of vocabulary-parallel heads, without materialising logits.

Shapes: N this rank's tokens, R all tokens of the tensor-parallel group under sequence parallelism (else N),
T / D hidden width of teacher / student, W rows of this rank's head shard (padding included),
M rows = R per model, teacher's first (2R, or R without a teacher).

Source: docs/method.md.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fdd.ops.blocks import LinearKL, TokenBlock, finished_blocks, make_sweeps
from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.head_gradient import HeadGradient
from megatron_fdd.ops.heads import Heads, Model
from megatron_fdd.ops.implementation import DEFAULT_IMPLEMENTATION, Implementation
from megatron_fdd.ops.kl_gradients import (
    Normalisers,
    Pulls,
    Upstream,
    label_slope,
    normalisers_of,
    pulled_gradient,
    pulls_of,
)
from megatron_fdd.ops.reference import reference_linear_kl
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.vocab_shard import VocabShard

__all__ = [
    "DEFAULT_IMPLEMENTATION",
    "Divergence",
    "Heads",
    "Implementation",
    "LinearKL",
    "VocabShard",
    "linear_kl",
]


def linear_kl(
    teacher_NT: Tensor | None,
    student_ND: Tensor,
    heads: Heads,
    *,
    divergence: Divergence | None,
    labels_N: Tensor | None = None,
    needs_lse: bool = True,
) -> LinearKL:
    """Compute divergence, log-sum-exps and cross-entropy of two linear heads for each token.

    Gradient flows to `student_ND` and, if it requires one, to the student's head; never to the teacher. With a
    constant head the hidden states' gradient comes from sums of the forward sweep (the backward pass scales and adds
    them); a trained head is swept again in the backward pass. Memory besides inputs and outputs: two [R, tile]
    buffers, the copy of hidden states in the products' dtype, and for the backward pass at most two [R, D] (constant
    head) or the gathered hidden states (trained head). Not differentiable twice.

    Args:
        teacher_NT: None: no teacher (`divergence` must then be None).
        student_ND: N may be 0.
        divergence: None: no divergence.
        labels_N: ids of the whole vocabulary; negative: no label. Beyond the vocabulary: a cross-entropy of NaN,
            with every implementation. None: no cross-entropy.
        needs_lse: whether the log-sum-exps are outputs. At a temperature other than 1 they cost an
            exponential, and with a constant head one product for their gradient.

    Collectives over `heads.shard.group` (one rank: none), for each block of `implementation.block_rows` tokens, during
        the products of the next block. Forward: one all-gather of the packed statistics, [R] times 5 for fkl and rkl,
        else 4 (2 without a teacher), plus 2 for lse or labels at a temperature other than 1, plus 1 for labels;
        divergences of two sweeps (all but fkl and rkl) add one all-reduce of [2, R]. All are float32. Backward: one
        all-reduce of [N, D] in the student's dtype. Sequence parallelism adds, forward, one all-gather each of teacher,
        student and labels, and backward, once, one of [N, 3]; the all-reduce becomes a reduce-scatter.
    Source: docs/method.md.
    """
    teacher, student = heads.models(teacher_NT, student_ND)
    assert divergence is None or teacher is not None, "a divergence needs a teacher"
    assert divergence is not None or needs_lse or labels_N is not None, "nothing is asked for"
    assert labels_N is None or labels_N.shape == student_ND.shape[:1], f"labels {labels_N.shape}"
    head_gradient = torch.is_grad_enabled() and heads.student_WD.requires_grad
    request = Request(
        shard=heads.shard,
        divergence=divergence,
        needs_lse=needs_lse,
        has_labels=labels_N is not None,
        implementation=heads.implementation,
        body_gradient=torch.is_grad_enabled() and student_ND.requires_grad and not head_gradient,
        head_gradient=head_gradient,
        teacher_extras=heads.teacher_extras,
        student_extras=heads.student_extras,
    )
    if heads.implementation.chosen(heads.student_WD, divergence) == "reference":
        return LinearKL(*reference_linear_kl(request, teacher, student, labels_N))
    return LinearKL(*_LinearKL.apply(*student, teacher, labels_N, request))


class _LinearKL(torch.autograd.Function):
    """Gradient for the first two inputs, the student's. Outputs: LinearKL's fields."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        student_head_WD: Tensor,
        teacher: Model | None,
        labels_N: Tensor | None,
        request: Request,
    ) -> tuple[Tensor | None, ...]:
        outputs: list[LinearKL] = []
        kept: list[tuple[Tensor | None, ...]] = []
        for block in finished_blocks(request, teacher, (student_ND, student_head_WD), labels_N):
            outputs.append(block.outputs(request))
            kept.append(_kept(request, block))
        ctx.request, ctx.head_WD, ctx.num_kept = request, student_head_WD, len(kept[0])
        ctx.student_dtype, ctx.num_tokens = student_ND.dtype, len(student_ND)
        heads = (student_head_WD, None if teacher is None else teacher[1])
        ctx.save_for_backward(*heads, *itertools.chain.from_iterable(kept))
        joined = LinearKL(
            *(None if parts[0] is None else torch.cat(parts) for parts in zip(*outputs, strict=True))
        )
        if joined.teacher_lse_N is not None:
            ctx.mark_non_differentiable(joined.teacher_lse_N)
        return tuple(joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream_N: Tensor | None) -> tuple[Tensor | None, ...]:
        request: Request = ctx.request
        head_WD, teacher_head_WT, *kept = ctx.saved_tensors
        pieces = request.blocks(ctx.num_tokens)
        head_gradient = HeadGradient(ctx.head_WD, parts=len(pieces)) if request.head_gradient else None
        reductions = []
        stacked = _stack_upstream(request, upstream_N)
        for index, rows in enumerate(pieces):
            labels_R, slope_R, *state = kept[index * ctx.num_kept : (index + 1) * ctx.num_kept]
            upstream = _upstream(stacked[:, rows], request.temperature, labels_R, slope_R)
            if head_gradient is None:
                gradient_RD = pulled_gradient(upstream, Pulls(*state), head_WD, labels_R, request.shard)
            else:
                student_RD, teacher_RT, *normalisers = state
                teacher = None if teacher_RT is None else (teacher_RT, teacher_head_WT)
                sweeps = make_sweeps(request, teacher, (student_RD, head_WD))
                gradient_RD = sweeps.gradients(
                    upstream, Normalisers(*normalisers), labels_R, head_gradient.sum_WD
                )
            if ctx.needs_input_grad[0]:
                reductions.append(request.shard.start_reduce(gradient_RD.to(ctx.student_dtype)))
        parts = [reduction.wait() for reduction in reductions]
        gradient_ND = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else None
        return gradient_ND, None if head_gradient is None else head_gradient.finish(), None, None, None


def _kept(request: Request, block: TokenBlock) -> tuple[Tensor | None, ...]:
    """Return what a block's backward pass needs."""
    swept = block.swept
    labels = swept.labels_R, label_slope(request, block.statistics, swept.labels_R)
    if request.head_gradient:
        hiddens = (swept.student[0], None if swept.teacher is None else swept.teacher[0])
        return *labels, *hiddens, *normalisers_of(request, block.statistics, block.second)
    if request.body_gradient:
        return *labels, *pulls_of(request, swept.sums, block.statistics, block.second)
    return ()


def _stack_upstream(request: Request, upstream_N: tuple[Tensor | None, ...]) -> Tensor:
    """Stack all tokens' upstream gradients, [ranks, N, 3]. Collectives: one all-gather under sequence parallelism."""
    like = next(gradient for gradient in upstream_N if gradient is not None)
    divergence, _, lse, entropy = (torch.zeros_like(like) if g is None else g for g in upstream_N)
    stacked = torch.stack([divergence, lse, entropy], dim=1)
    return request.shard.start_stack(stacked).wait() if request.shard.splits_tokens else stacked[None]


def _upstream(
    stacked: Tensor, temperature: float, labels_R: Tensor | None, slope_R: Tensor | None
) -> Upstream:
    """Return the upstream gradients of one block, from those of its tokens of all ranks."""
    divergence_R, lse_R, entropy_R = stacked.flatten(0, 1).unbind(1)
    if labels_R is not None:
        entropy_R = entropy_R.masked_fill(labels_R < 0, 0.0)
    label_R = entropy_R if slope_R is None else entropy_R * slope_R
    return Upstream(divergence_R * temperature, lse_R + entropy_R, label_R)
