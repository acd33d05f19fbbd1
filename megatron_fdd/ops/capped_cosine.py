"""Cosine of two models' log-probability differences where the student's logits have a soft cap.

Logits are then not linear in the student's features, and nothing of the Gram forms of `ops/delta.py` is left. With the
changes t and s of teacher's and student's logits between two layers,
    D = u - e 1,    u = t - mean(t) 1,    e = c - mean(t),    <D^T, D^S> = <u_T, u_S> + V e_T e_S
comes from five sums over the vocabulary for each token, and the student's gradient from one more sweep:
    d s / d(features) = slope(later) W d(later) - slope(earlier) W d(earlier),    slope = 1 - (z / c)^2.

Shapes: N this rank's tokens, R all tokens of the tensor-parallel group under sequence parallelism (else N), T / D
hidden width of teacher / student, W rows of this rank's head shard, C rows of a tile, V the vocabulary.

Precision: as in `delta_cosine` everything is float32, on a GPU sums of bf16 parts' products. Source: docs/method.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fdd.ops.delta import square_and_zero
from megatron_fdd.ops.full_precision import add_exact_product, full_precision
from megatron_fdd.ops.head_gradient import collected
from megatron_fdd.ops.head_grams import head_means
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.logit_changes import Ends, LogitChanges


def capped_cosine(
    teacher: Ends,
    student: Ends,
    lse_deltas: tuple[Tensor, Tensor] | None,
    heads: Heads,
    *,
    is_earlier_constant: bool = False,
) -> Tensor:
    """Return the cosine over the vocabulary of teacher's and student's differences, [N], float32 (float64 for float64).

    Gradient flows to the student's features, log-sum-exps and, if it requires one, head. Where either difference is
    zero, or zero up to rounding, the cosine is 1 with zero gradient. Each token costs products over the vocabulary:
    twice [T, V] and twice [V, D] forward and again backward, and there two more [V, D] for the features and two for a
    trained head (one each if the earlier end is a constant), all in float32. Not differentiable twice.

    Args:
        lse_deltas: the teacher's and the student's differences of log-sum-exps at temperature 1, [N]; None: the centred
            form, which removes the mean over the vocabulary.
        is_earlier_constant: whether the student's earlier layer is a constant as a whole, with the head there.

    Collectives over `heads.shard.group` (one rank: none), all float32. Forward: one all-reduce of [T + D + 1]; one of
        [N, 5]. Backward: one all-reduce each of [N, D] for both layers. Sequence parallelism adds, forward, all-gathers
        of both layers of both models, and backward one of [N, 5]; the all-reduces of tokens become reduce-scatters.
    """
    assert heads.teacher_WT is not None, "the delta compares with a teacher"
    products = _Products(
        *_ChangeProducts.apply(*student, collected(heads.student_WD), teacher, heads, is_earlier_constant)
    )
    teacher_e_N, student_e_N = (torch.zeros_like(products.dot_N) for _ in range(2))
    if lse_deltas is not None:
        teacher_e_N = lse_deltas[0].detach() - products.teacher_mean_N
        student_e_N = lse_deltas[1] - products.student_mean_N
    size = products.size
    teacher_N, teacher_zero_N = square_and_zero(
        products.teacher_square_N, teacher_e_N, products.teacher_mean_N, size
    )
    student_N, student_zero_N = square_and_zero(
        products.student_square_N, student_e_N, products.student_mean_N, size
    )
    zero_N = teacher_zero_N | student_zero_N
    dot_N = products.dot_N + size * teacher_e_N * student_e_N
    # Replaced before the roots, because the root of rounding noise may be NaN.
    roots_N = teacher_N.masked_fill(zero_N, 1.0).rsqrt() * student_N.masked_fill(zero_N, 1.0).rsqrt()
    return (dot_N * roots_N).masked_fill(zero_N, 1.0)


class _Products(NamedTuple):
    """The moments of both changes over the vocabulary: means, and products without them."""

    dot_N: Tensor  # <u_T, u_S>
    teacher_mean_N: Tensor
    teacher_square_N: Tensor  # |u_T|^2
    student_mean_N: Tensor
    student_square_N: Tensor
    size: Tensor  # V, 0-dim


class _ChangeProducts(torch.autograd.Function):
    """Gradient for the first three inputs, from the student's outputs. Outputs: the fields of `_Products`."""

    @staticmethod
    @full_precision()
    def forward(
        ctx: Any,
        earlier_ND: Tensor,
        later_ND: Tensor,
        student_head_WD: Tensor,
        teacher: Ends,
        heads: Heads,
        is_earlier_constant: bool,
    ) -> tuple[Tensor, ...]:
        assert heads.teacher_WT is not None
        shard = heads.shard
        teacher_mean_T, student_mean_D, size = head_means(heads.teacher_WT, student_head_WD, shard)
        theirs = LogitChanges(teacher, heads.teacher_WT, heads.teacher_extras, teacher_mean_T, heads)
        ends = Ends(earlier_ND, later_ND)
        ours = LogitChanges(ends, student_head_WD, heads.student_extras, student_mean_D, heads)
        sums_R5 = ours.centre_R.new_zeros(len(ours.centre_R), 5)
        for columns in ours.tiles():
            teacher_CT, student_CD = theirs.head(columns), ours.head(columns)
            for rows in ours.blocks():
                teacher_RC = theirs.change(rows, columns, teacher_CT)
                student_RC = ours.change(rows, columns, student_CD)
                moments = (teacher_RC, student_RC, teacher_RC**2, student_RC**2, teacher_RC * student_RC)
                sums_R5[rows] += torch.stack([each.sum(1) for each in moments], dim=1)
        sums = shard.start_reduce(sums_R5).wait().unbind(1)
        teacher_rest_N, student_rest_N = sums[0] / size, sums[1] / size
        ctx.theirs, ctx.ours, ctx.shard, ctx.is_earlier_constant = theirs, ours, shard, is_earlier_constant
        ctx.dtype = later_ND.dtype
        ctx.save_for_backward(student_head_WD, teacher_rest_N, student_rest_N, size)
        products = _Products(
            sums[4] - size * teacher_rest_N * student_rest_N,
            teacher_rest_N + shard.own_tokens(theirs.centre_R),
            sums[2] - size * teacher_rest_N**2,
            student_rest_N + shard.own_tokens(ours.centre_R),
            sums[3] - size * student_rest_N**2,
            size,
        )
        ctx.mark_non_differentiable(products.teacher_mean_N, products.teacher_square_N, products.size)
        return tuple(products)

    @staticmethod
    @once_differentiable
    @full_precision()
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        student_head_WD, teacher_rest_N, student_rest_N, size = ctx.saved_tensors
        given = _Products(*upstream)
        factors = (given.dot_N, 2 * given.student_square_N, given.student_mean_N / size)
        packed_N5 = torch.stack([*factors, teacher_rest_N, student_rest_N], dim=1)
        packed_R5 = ctx.shard.start_gather(packed_N5).wait()
        head_gradient_WD = torch.zeros_like(student_head_WD) if ctx.needs_input_grad[2] else None
        earlier_RD, later_RD = _gradients(ctx, packed_R5, head_gradient_WD)
        pending = [None if each is None else ctx.shard.start_reduce(each) for each in (earlier_RD, later_RD)]
        own = [None if each is None else each.wait().to(ctx.dtype) for each in pending]
        return *own, head_gradient_WD, None, None, None


def _gradients(ctx: Any, packed_R5: Tensor, head_gradient_WD: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Return this rank's part of the gradients for both layers' features, [R, D]; write the head's.

    Args:
        packed_R5: factors of u_T, of u_S and of 1 in the gradient of the student's change, and what is left of both
            changes' means.
    """
    theirs: LogitChanges = ctx.theirs
    ours: LogitChanges = ctx.ours
    later_RD = torch.zeros_like(ours.ends.later)
    earlier_RD = None if ctx.is_earlier_constant else torch.zeros_like(later_RD)
    for columns in ours.tiles():
        teacher_CT, student_CD = theirs.head(columns), ours.head(columns)
        head_CD = torch.zeros_like(student_CD)
        for rows in ours.blocks():
            on_teacher, on_student, on_mean, teacher_rest, student_rest = packed_R5[rows, :, None].unbind(1)
            earlier_RC, later_RC = ours.logits(rows, columns, student_CD)
            student_RC = later_RC - earlier_RC - ours.centre_R[rows, None] - student_rest
            gradient_RC = on_student * student_RC + on_mean
            gradient_RC += on_teacher * (theirs.change(rows, columns, teacher_CT) - teacher_rest)
            ends = [(later_RD, ours.ends.later, later_RC, 1.0)]
            if earlier_RD is not None:
                ends.append((earlier_RD, ours.ends.earlier, earlier_RC, -1.0))
            for total_RD, end_RD, logits_RC, sign in ends:
                slope_RC = ours.extras.slope(logits_RC)
                own_RC = gradient_RC * (sign if slope_RC is None else slope_RC * sign)
                add_exact_product(total_RD[rows], own_RC, student_CD)
                if head_gradient_WD is not None:
                    add_exact_product(head_CD, own_RC.T, end_RD[rows])
        if head_gradient_WD is not None:
            head_gradient_WD[columns] = head_CD.to(head_gradient_WD.dtype)
    return earlier_RD, later_RD
