"""Divergence, log-sum-exp and cross-entropy of vocabulary-parallel heads, without materialising logits.

Shapes: N this rank's tokens, R all tokens of the tensor-parallel group under sequence parallelism (else N),
T / S hidden width of teacher / student, W rows of this rank's head shard (padding included),
M rows = R per model, teacher's first (2R, or R without a teacher).

Source: method.md, sections 5 and 6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fdd.ops.divergence import Divergence, DivergenceKind
from megatron_fdd.ops.kl_gradients import (
    Normalisers,
    Pulls,
    Upstream,
    normalisers_of,
    pulled_gradient,
    pulls_of,
    swept_gradients,
)
from megatron_fdd.ops.plan import Model, Plan
from megatron_fdd.ops.softmax_sums import MixtureSums, SoftmaxSums, VocabStatistics, merge, mixture_sums
from megatron_fdd.ops.vocab_shard import VocabShard, label_logits

__all__ = ["Divergence", "DivergenceKind", "LinearKL", "VocabShard", "linear_kl"]

DEFAULT_TILE_SIZE = 2048


class LinearKL(NamedTuple):
    """Numbers per token, [N], float32 (float64 for float64 input); None where not asked for."""

    divergence_N: Tensor | None  # includes the factor T^2
    teacher_lse_N: Tensor | None  # at temperature 1; never carries gradient
    student_lse_N: Tensor | None  # at temperature 1
    cross_entropy_N: Tensor | None  # at temperature 1; 0 without gradient where the label is negative


def linear_kl(
    teacher_NT: Tensor | None,
    teacher_head_WT: Tensor | None,
    student_NS: Tensor,
    student_head_WS: Tensor,
    *,
    shard: VocabShard,
    divergence: Divergence | None,
    labels_N: Tensor | None = None,
    needs_lse: bool = True,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> LinearKL:
    """Per-token divergence, log-sum-exps and cross-entropy of two linear heads.

    Gradient flows to `student_NS` and, where it requires one, to `student_head_WS`; never to the teacher.
    A constant head gets its hidden states' gradient from sums of the forward sweep (backward: scaled adds);
    a trained head is swept again backward. Memory beside inputs and outputs: three [R, tile] buffers, the
    copy of hidden states in the products' dtype, and kept for the backward pass at most two [R, S] (constant
    head) or the gathered hidden states (trained head). Not differentiable twice.

    Args:
        teacher_NT, teacher_head_WT: both None: no teacher (then `divergence` must be None).
        student_NS, student_head_WS: the heads' rows are this rank's part of the vocabulary, as `shard` says;
            the two heads may be padded differently beyond `shard.num_valid`. N may be 0.
        divergence: None: no divergence.
        labels_N: vocabulary ids (of the whole vocabulary); negative: no label. None: no cross-entropy.
        needs_lse: whether the log-sum-exps are outputs. At another temperature than 1 they cost an
            exponential, and with a constant head one product for their gradient.
        tile_size: columns of the vocabulary that exist at a time.

    Collectives over `shard.group` (one rank: none). Forward: one all-gather of the packed statistics, [R]
        times 5 for fkl and rkl, else 4 (2 without a teacher), plus 2 for lse or labels at another temperature
        than 1, plus 1 for labels; jsd, sfkl and srkl add one all-reduce of [2, R]. All in float32. Backward:
        one all-reduce of [N, S] in the student's dtype. Sequence parallelism adds, forward, one all-gather
        each of teacher, student and labels, and backward one of [N, 3]; the all-reduce becomes a
        reduce-scatter.
    Source: method.md, section 5.
    """
    assert (teacher_NT is None) == (teacher_head_WT is None), "a teacher has hidden states and a head"
    teacher: Model | None = None
    if teacher_NT is not None and teacher_head_WT is not None:
        teacher = (teacher_NT.detach(), teacher_head_WT.detach())
    assert tile_size > 0, f"tile_size {tile_size}"
    assert divergence is None or teacher is not None, "a divergence needs a teacher"
    assert divergence is not None or needs_lse or labels_N is not None, "nothing is asked for"
    _check_shapes(teacher, (student_NS, student_head_WS), labels_N, shard)
    head_gradient = torch.is_grad_enabled() and student_head_WS.requires_grad
    plan = Plan(
        shard=shard,
        divergence=divergence,
        needs_lse=needs_lse,
        has_labels=labels_N is not None,
        tile_size=tile_size,
        body_gradient=torch.is_grad_enabled() and student_NS.requires_grad and not head_gradient,
        head_gradient=head_gradient,
    )
    return LinearKL(*_LinearKL.apply(student_NS, student_head_WS, teacher, labels_N, plan))


def _check_shapes(teacher: Model | None, student: Model, labels_N: Tensor | None, shard: VocabShard) -> None:
    num_tokens = len(student[0])
    for hidden, head in (student,) if teacher is None else (teacher, student):
        assert hidden.ndim == head.ndim == 2, (
            f"{hidden.shape}, {head.shape}: [tokens, width] and [rows, width]"
        )
        assert hidden.shape[1] == head.shape[1], f"{hidden.shape} and {head.shape} differ in width"
        assert len(hidden) == num_tokens, f"{len(hidden)} rows of a model, {num_tokens} of the student"
        assert len(head) >= max(1, shard.num_valid), f"{len(head)} rows of a head, {shard.num_valid} valid"
    assert labels_N is None or labels_N.shape == (num_tokens,), (
        f"{labels_N.shape} labels, {num_tokens} tokens"
    )


class _LinearKL(torch.autograd.Function):
    """Gradient for the first two inputs, the student's. Outputs: LinearKL's fields."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NS: Tensor,
        student_head_WS: Tensor,
        teacher: Model | None,
        labels_N: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor | None, ...]:
        shard = plan.shard
        student = (shard.gather_tokens(student_NS), student_head_WS)
        teacher = None if teacher is None else (shard.gather_tokens(teacher[0]), teacher[1])
        labels_R = None if labels_N is None else shard.gather_tokens(labels_N)
        tiles = plan.tiles(teacher, student)
        sums = SoftmaxSums(tiles, plan)
        label_logit_R = None if labels_R is None else label_logits(*student, labels_R, shard)
        statistics = merge(sums, label_logit_R, shard)
        mixture = None
        if plan.mixture is not None:
            mixture = mixture_sums(tiles, plan.mixture, statistics.lse_M, shard, gradient=plan.body_gradient)
        ctx.plan, ctx.student_dtype = plan, student_NS.dtype
        if plan.head_gradient:
            normalisers = normalisers_of(plan, statistics, mixture)
            ctx.save_for_backward(
                student_head_WS, labels_R, student[0], *(teacher or (None, None)), *normalisers
            )
        elif plan.body_gradient:
            head_WS = student_head_WS if plan.has_labels else None
            ctx.save_for_backward(head_WS, labels_R, *pulls_of(plan, sums, statistics, mixture))
        outputs = _outputs(plan, statistics, mixture, labels_R)
        if outputs.teacher_lse_N is not None:
            ctx.mark_non_differentiable(outputs.teacher_lse_N)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream_N: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        head_WS, labels_R, *kept = ctx.saved_tensors
        upstream = _gather_upstream(plan, upstream_N, labels_R)
        head_gradient_WS = None
        if plan.head_gradient:
            student_RS, teacher_RT, teacher_head_WT, *normalisers = kept
            teacher = None if teacher_RT is None else (teacher_RT, teacher_head_WT)
            tiles = plan.tiles(teacher, (student_RS, head_WS))
            gradient_RS, head_gradient_WS = swept_gradients(
                plan, tiles, upstream, Normalisers(*normalisers), labels_R
            )
        else:
            gradient_RS = pulled_gradient(upstream, Pulls(*kept), head_WS, labels_R, plan.shard)
        gradient_NS = None
        if ctx.needs_input_grad[0]:
            gradient_NS = plan.shard.reduce_tokens(gradient_RS.to(ctx.student_dtype))
        return gradient_NS, head_gradient_WS, None, None, None


def _outputs(
    plan: Plan, statistics: VocabStatistics, mixture: MixtureSums | None, labels_R: Tensor | None
) -> LinearKL:
    """What is asked for, of this rank's tokens."""
    value_R = statistics.kl_R if mixture is None else mixture.value_R
    *teacher_lse, student_lse_R = statistics.unit_lse_M.view(statistics.num_models, -1)
    entropy_R = None
    if labels_R is not None and statistics.label_logit_R is not None:
        entropy_R = (student_lse_R - statistics.label_logit_R).masked_fill_(labels_R < 0, 0.0)
    outputs = LinearKL(
        None if value_R is None else value_R * plan.temperature**2,
        teacher_lse[0] if teacher_lse and plan.needs_lse else None,
        student_lse_R if plan.needs_lse else None,
        entropy_R,
    )
    # Copies: two outputs must not share memory, nor with what is kept for the backward pass.
    return LinearKL(
        *(None if output is None else plan.shard.own_tokens(output).clone() for output in outputs)
    )


def _gather_upstream(plan: Plan, upstream_N: tuple[Tensor | None, ...], labels_R: Tensor | None) -> Upstream:
    """All tokens' upstream gradients. Collectives: one all-gather of [N, 3] under sequence parallelism."""
    like = next(gradient for gradient in upstream_N if gradient is not None)
    divergence, _, lse, entropy = (torch.zeros_like(like) if g is None else g for g in upstream_N)
    gathered_R3 = plan.shard.gather_tokens(torch.stack([divergence, lse, entropy], dim=1))
    divergence_R, lse_R, entropy_R = gathered_R3.unbind(1)
    if labels_R is not None:
        entropy_R = entropy_R.masked_fill(labels_R < 0, 0.0)
    return Upstream(divergence_R * plan.temperature, lse_R + entropy_R, entropy_R)
