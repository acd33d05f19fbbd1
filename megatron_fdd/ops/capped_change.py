"""The teacher's change of prediction under a soft cap, streamed over the vocabulary: its share in the delta's cosine.

Under a cap logits are not linear in the features, and no Gram matrix gives their change
    t = z(l_j) - z(l_j-1),    z = c tanh((W_T x + b) / c).
But |D^S|^2 keeps its Gram form, and products with t over the vocabulary are sums over tiles:
    D^T = u - e 1,    u = t - mean(t) 1,    e = c_T - mean(t),    <D^T, D^S> = (C_S' u) . a_S + V e_T e_S

Shapes: N this rank's tokens, n the part of them that it computes, R all tokens of the tensor-parallel group under
sequence parallelism (else N), T / D hidden width of teacher / student, C rows of a tile of the heads.

Precision: as in `delta_cosine` everything is float32, on a GPU sums of bf16 parts' products. Source: docs/method.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fdd.ops.full_precision import add_exact_product, exact_product, full_precision
from megatron_fdd.ops.head_gradient import collected
from megatron_fdd.ops.head_grams import HeadGrams
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.logit_changes import Ends, LogitChanges
from megatron_fdd.ops.vocab_shard import VocabShard
from megatron_fdd.ops.vocab_tiles import statistics_dtype


class TeacherChange(NamedTuple):
    """What the delta's cosine needs of the teacher's change t, for the tokens that this rank computes."""

    on_student_nD: Tensor  # C_S' u; gives its gradient to the student's head
    mean_n: Tensor  # of t over the vocabulary
    square_n: Tensor  # |u|^2

    def detach(self) -> TeacherChange:
        """Return the same numbers without gradient."""
        return TeacherChange(*(each.detach() for each in self))


def capped_change(earlier_NT: Tensor, later_NT: Tensor, heads: Heads, grams: HeadGrams) -> TeacherChange:
    """Compare a teacher's capped logits of two layers; the result takes the place of `delta_cosine`'s first argument.

    Gradient flows to the student's head if it requires one. Each token costs three products over the vocabulary,
    [T, V] twice and [V, D], in float32; with a trained head as many again in the backward pass, which makes the logits
    anew. Memory: up to four buffers [block_rows, tile], [R, D + 2], and for the backward pass of a trained head the
    features of both layers.

    Args:
        earlier_NT, later_NT: normed hidden states of both layers, float32.
        grams: of the same heads.

    Collectives over `heads.shard.group` (one rank: none). Forward: one all-reduce of [N, D + 2]; under sequence
        parallelism two all-gathers of [N, T], and the all-reduce becomes a reduce-scatter. Backward, for a trained
        head: one all-gather of [n, D + 1]. All are float32.
    """
    assert heads.teacher_WT is not None, "the delta compares with a teacher"
    assert heads.teacher_extras.cap is not None, "without a cap the change is linear in the features"
    return TeacherChange(
        *_CappedChange.apply(
            collected(heads.student_WD), earlier_NT.detach(), later_NT.detach(), heads, grams
        )
    )


class _CappedChange(torch.autograd.Function):
    """Gradient for the first input, from the first output. Outputs: TeacherChange's fields."""

    @staticmethod
    @full_precision()
    def forward(
        ctx: Any,
        student_head_WD: Tensor,
        earlier_NT: Tensor,
        later_NT: Tensor,
        heads: Heads,
        grams: HeadGrams,
    ) -> tuple[Tensor, ...]:
        shard, size, dtype = heads.shard, grams.vocab_size, statistics_dtype(student_head_WD)
        assert heads.teacher_WT is not None
        ends = Ends(earlier_NT, later_NT)
        changes = LogitChanges(ends, heads.teacher_WT, heads.teacher_extras, grams.teacher_mean_T, heads)
        student_mean_D, width = grams.student_mean_D.detach(), student_head_WD.shape[1]
        sums_RX = changes.centre_R.new_zeros(len(changes.centre_R), width + 2)
        for columns in changes.tiles():
            student_CD = student_head_WD[columns].to(dtype) - student_mean_D
            teacher_CT = changes.head(columns)
            for rows in changes.blocks():
                change_RC = changes.change(rows, columns, teacher_CT)
                sums_RX[rows, :width] += exact_product(change_RC, student_CD)
                sums_RX[rows, width] += change_RC.sum(1)
                sums_RX[rows, width + 1] += change_RC.square_().sum(1)
        own_nX = shard.token_share(shard.start_reduce(sums_RX).wait())
        rest_n = own_nX[:, width] / size
        mean_n = rest_n + shard.token_share(shard.own_tokens(changes.centre_R))
        square_n = own_nX[:, width + 1] - size * rest_n**2
        ctx.heads, ctx.changes, ctx.num_tokens = heads, changes, len(later_NT)
        ctx.save_for_backward(student_head_WD, rest_n)
        ctx.mark_non_differentiable(mean_n, square_n)
        return own_nX[:, :width].contiguous(), mean_n, square_n

    @staticmethod
    @once_differentiable
    @full_precision()
    def backward(ctx: Any, upstream_nD: Tensor, *_of_constants: None) -> tuple[Tensor | None, ...]:
        student_head_WD, rest_n = ctx.saved_tensors
        changes: LogitChanges = ctx.changes
        packed_nX = torch.cat([upstream_nD, rest_n[:, None]], dim=1)
        packed_RX = _all_tokens(packed_nX, ctx.num_tokens, ctx.heads.shard)
        gradient_WD = torch.zeros_like(student_head_WD)
        for columns in changes.tiles():
            gradient_CD = packed_RX.new_zeros(columns.stop - columns.start, student_head_WD.shape[1])
            teacher_CT = changes.head(columns)
            for rows in changes.blocks():
                change_RC = changes.change(rows, columns, teacher_CT)
                centred_RC = change_RC.sub_(packed_RX[rows, -1:])
                add_exact_product(gradient_CD, centred_RC.T, packed_RX[rows, :-1].contiguous())
            gradient_WD[columns] = gradient_CD
        return gradient_WD, None, None, None, None


def _all_tokens(tensor_n: Tensor, num_tokens: int, shard: VocabShard) -> Tensor:
    """Join what the ranks computed for their tokens, [n, ...] -> [R, ...]. Collectives: one all-gather."""
    return shard.start_gather(shard.join_shares(tensor_n, num_tokens)).wait()
