"""Gram matrices of two vocabulary-parallel heads: all that the delta needs from the vocabulary.

Shapes: T / D hidden width of teacher / student, W rows of this rank's head shard, C rows of a tile.

Precision: products read the weights' dtype (centred: float32); sums are float32, without TF32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fdd.ops.full_precision import add_exact_product, exact_product, full_precision
from megatron_fdd.ops.head_gradient import collected
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.vocab_shard import VocabShard
from megatron_fdd.ops.vocab_tiles import accumulate, product_dtype, statistics_dtype

ROWS_PER_TILE = 4096


@dataclass(frozen=True, slots=True)
class HeadGrams:
    """Gram matrices and column sums over the whole vocabulary without padding; float32, equal on all ranks.

    `centred`: column means are removed from the matrices. `vocab_size` is a 0-dim tensor (no host sync). `shard`: how
    the heads' rows, and the tokens, lie on the ranks.
    """

    teacher_teacher_TT: Tensor
    teacher_student_TD: Tensor
    student_student_DD: Tensor
    teacher_sum_T: Tensor
    student_sum_D: Tensor
    vocab_size: Tensor
    centred: bool
    shard: VocabShard


def head_grams(heads: Heads, *, centred: bool, previous: HeadGrams | None = None) -> HeadGrams:
    """Compute the Gram matrices of both heads; differentiable in the student's head if that requires a gradient.

    Every rank uses them for different tokens (see `delta_cosine`), so that the gradients of a Gram are summed.

    Args:
        previous: an earlier result for the same teacher head; its teacher part is reused.

    Collectives over `heads.shard.group` (one rank: none). Forward: one all-reduce of the matrices, packed with the
        sums and the vocabulary's size; if centred, sums and size have an all-reduce of their own, before. Backward,
        for a student's head that requires a gradient: one all-reduce of [T D + D D + D] numbers. All are float32.
    """
    assert heads.teacher_WT is not None, "the delta compares with a teacher"
    assert previous is None or previous.centred == centred, "the earlier Grams are of the other form"
    teacher_student_TD, student_student_DD, student_sum_D, *teacher = _HeadGrams.apply(
        collected(heads.student_WD), heads.teacher_WT.detach(), heads.shard, centred, previous
    )
    if previous is not None:
        teacher = [previous.teacher_teacher_TT, previous.teacher_sum_T, previous.vocab_size]
    return HeadGrams(
        teacher_teacher_TT=teacher[0],
        teacher_student_TD=teacher_student_TD,
        student_student_DD=student_student_DD,
        teacher_sum_T=teacher[1],
        student_sum_D=student_sum_D,
        vocab_size=teacher[2],
        centred=centred,
        shard=heads.shard,
    )


class _HeadGrams(torch.autograd.Function):
    """Gradient for the first input. Outputs: G_TD, G_SS, u_S and, without `previous`, G_TT, u_T, V."""

    @staticmethod
    @full_precision()
    def forward(
        ctx: Any,
        student_head_WD: Tensor,
        teacher_head_WT: Tensor,
        shard: VocabShard,
        centred: bool,
        previous: HeadGrams | None,
    ) -> tuple[Tensor, ...]:
        dtype = statistics_dtype(student_head_WD)
        sums = [_column_sum(student_head_WD, shard, dtype)]
        if previous is None:
            sums += [_column_sum(teacher_head_WT, shard, dtype), sums[0].new_tensor(shard.num_valid)]
        means = None
        if centred:
            sums = _all_reduce_packed(sums, shard)
            known = [previous.teacher_sum_T, previous.vocab_size] if previous is not None else []
            student_sum_D, teacher_sum_T, size = sums + known
            means = (teacher_sum_T / size, student_sum_D / size)
        rows = _HeadRows(teacher_head_WT, student_head_WD, shard.num_valid, means)
        matrices = rows.products(with_teacher=previous is None)
        if centred:
            matrices = _all_reduce_packed(matrices, shard)
        else:
            reduced = _all_reduce_packed(sums + matrices, shard)
            sums, matrices = reduced[: len(sums)], reduced[len(sums) :]
        ctx.shard, ctx.dtype = shard, dtype
        ctx.save_for_backward(teacher_head_WT, student_head_WD, *(means or ()))
        ctx.mark_non_differentiable(*matrices[2:], *sums[1:])
        return (*matrices[:2], sums[0], *matrices[2:], *sums[1:])

    @staticmethod
    @once_differentiable
    @full_precision()
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        teacher_head_WT, student_head_WD, *means = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        # These are sums over this rank's tokens, and each token is known to one rank only.
        teacher_student_TD, student_student_DD, student_sum_D = _all_reduce_packed(list(upstream[:3]), shard)
        both_DD = student_student_DD + student_student_DD.T
        gradient_WD = torch.zeros_like(student_head_WD)
        rows = _HeadRows(teacher_head_WT, student_head_WD, shard.num_valid, tuple(means) or None)
        for columns, teacher_CT, student_CD in rows.tiles():
            gradient_CD = exact_product(teacher_CT.to(ctx.dtype), teacher_student_TD)
            add_exact_product(gradient_CD, student_CD.to(ctx.dtype), both_DD).add_(student_sum_D)
            gradient_WD[columns] = gradient_CD
        return gradient_WD, None, None, None, None


@dataclass(frozen=True, slots=True)
class _HeadRows:
    """The rows of both heads that are vocabulary, tile by tile; minus the column means, if those are given."""

    teacher_head_WT: Tensor
    student_head_WD: Tensor
    num_valid: int
    means: tuple[Tensor, ...] | None

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, teacher's [C, T], student's [C, D]), in the dtype in which both are multiplied."""
        heads = (self.teacher_head_WT, self.student_head_WD)
        dtype = torch.promote_types(product_dtype(heads[0]), product_dtype(heads[1]))
        for start in range(0, self.num_valid, ROWS_PER_TILE):
            rows = slice(start, min(start + ROWS_PER_TILE, self.num_valid))
            if self.means is None:
                teacher_CT, student_CD = (head[rows].to(dtype) for head in heads)
            else:
                # Subtracted here and not from the Gram: large means would drown the rest in G - u u'/V.
                pairs = zip(heads, self.means, strict=True)
                teacher_CT, student_CD = (head[rows].to(mean.dtype) - mean for head, mean in pairs)
            yield rows, teacher_CT, student_CD

    def products(self, *, with_teacher: bool) -> list[Tensor]:
        """Return this rank's part of G_TD, G_SS and, if asked, G_TT."""
        widths = self.teacher_head_WT.shape[1], self.student_head_WD.shape[1]
        shapes = [widths, (widths[1], widths[1]), (widths[0], widths[0])]
        dtype = statistics_dtype(self.student_head_WD)
        totals = [self.student_head_WD.new_zeros(shape, dtype=dtype) for shape in shapes[: 2 + with_teacher]]
        for _, teacher_CT, student_CD in self.tiles():
            add = add_exact_product if teacher_CT.dtype == totals[0].dtype else accumulate
            add(totals[0], teacher_CT.T, student_CD)
            add(totals[1], student_CD.T, student_CD)
            if with_teacher:
                add(totals[2], teacher_CT.T, teacher_CT)
        return totals


def _column_sum(head: Tensor, shard: VocabShard, dtype: torch.dtype) -> Tensor:
    """Sum the rows that are vocabulary, tile by tile, so that a bf16 head is never widened as a whole."""
    total = head.new_zeros(head.shape[1], dtype=dtype)
    for tile in head[: shard.num_valid].split(ROWS_PER_TILE):
        total += tile.sum(0, dtype=dtype)
    return total


def _all_reduce_packed(tensors: list[Tensor], shard: VocabShard) -> list[Tensor]:
    """Sum tensors over ranks. Collectives: one all-reduce of all tensors together."""
    if shard.num_ranks == 1:
        return tensors
    packed = shard.all_reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
