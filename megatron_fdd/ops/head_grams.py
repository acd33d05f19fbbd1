"""Gram matrices of two vocabulary-parallel heads: all that the delta needs from the vocabulary.

Shapes: T / D hidden width of teacher / student, W rows of this rank's head shard, C rows of a tile.

Precision: rows without the column means, products and sums are float32, on a GPU sums of bf16 parts' products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fdd.ops.full_precision import Parts, add_exact_product, exact_product, full_precision, prepared
from megatron_fdd.ops.head_gradient import collected
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.vocab_shard import VocabShard
from megatron_fdd.ops.vocab_tiles import statistics_dtype

ROWS_PER_TILE = 4096


@dataclass(frozen=True, slots=True)
class HeadGrams:
    """Gram matrices of heads without their column means, and these means; float32, equal on all ranks.

    They are over the whole vocabulary without padding. `vocab_size` is a 0-dim tensor (no host sync). `shard`: how the
    heads' rows, and the tokens, lie on the ranks. `factors`: the three matrices, in their order and without gradient,
    as products read them.

    Gradient reaches the student's head through the right factor of a matrix; the left one is a constant, in
    `student_student_DD` too, because `delta_cosine` may need other states on the right. Autograd therefore gives half
    of the head's gradient of a form a' G a.
    """

    teacher_teacher_TT: Tensor
    teacher_student_TD: Tensor
    student_student_DD: Tensor
    teacher_mean_T: Tensor
    student_mean_D: Tensor
    vocab_size: Tensor
    shard: VocabShard
    factors: tuple[Tensor | Parts, Tensor | Parts, Tensor | Parts]


def head_grams(heads: Heads, *, previous: HeadGrams | None = None) -> HeadGrams:
    """Compute the Gram matrices of both heads; differentiable in the student's head if that requires a gradient.

    Every rank uses them for different tokens (see `delta_cosine`), so that the gradients of a Gram are summed.

    Args:
        previous: an earlier result for the same teacher head; its teacher part is reused.

    Collectives over `heads.shard.group` (one rank: none). Forward: one all-reduce of the column sums and the
        vocabulary's size, then one of the matrices. Backward, for a student's head that requires a gradient: one
        all-reduce of [T D + D D + D] numbers. All are float32.
    """
    assert heads.teacher_WT is not None, "the delta compares with a teacher"
    teacher_student_TD, student_student_DD, student_mean_D, *teacher = _HeadGrams.apply(
        collected(heads.student_WD), heads.teacher_WT.detach(), heads.shard, previous
    )
    if previous is not None:
        teacher = [previous.teacher_teacher_TT, previous.teacher_mean_T, previous.vocab_size]
    return HeadGrams(
        teacher_teacher_TT=teacher[0],
        teacher_student_TD=teacher_student_TD,
        student_student_DD=student_student_DD,
        teacher_mean_T=teacher[1],
        student_mean_D=student_mean_D,
        vocab_size=teacher[2],
        shard=heads.shard,
        factors=(
            prepared(teacher[0]) if previous is None else previous.factors[0],
            prepared(teacher_student_TD.detach()),
            prepared(student_student_DD.detach()),
        ),
    )


class StepGrams:
    """The Gram matrices of a step's heads: made once where both heads are constants of the step."""

    def __init__(self) -> None:
        self._grams: HeadGrams | None = None
        self._are_fresh = False

    def begin_step(self) -> None:
        """Forget that they are fresh: the student's head may have changed since the last step."""
        self._are_fresh = False

    def current(self, heads: Heads) -> HeadGrams:
        """Return the matrices of the heads as they are in this step; of a trained head each call has its own graph.

        Collectives over `heads.shard.group`: those of `head_grams`, once a step; for a trained head at every call.
        """
        if self._grams is None or not self._are_fresh or heads.student_WD.requires_grad:
            self._grams = head_grams(heads, previous=self._grams)
            self._are_fresh = True
        return self._grams


class _HeadGrams(torch.autograd.Function):
    """Gradient for the first input. Outputs: G_TD, G_SS, m_S and, without `previous`, G_TT, m_T, V."""

    @staticmethod
    @full_precision()
    def forward(
        ctx: Any,
        student_head_WD: Tensor,
        teacher_head_WT: Tensor,
        shard: VocabShard,
        previous: HeadGrams | None,
    ) -> tuple[Tensor, ...]:
        if previous is None:
            teacher_mean_T, student_mean_D, size = head_means(teacher_head_WT, student_head_WD, shard)
        else:
            teacher_mean_T, size, dtype = (
                previous.teacher_mean_T,
                previous.vocab_size,
                statistics_dtype(student_head_WD),
            )
            [student_sum_D] = _all_reduce_packed([_column_sum(student_head_WD, shard, dtype)], shard)
            student_mean_D = student_sum_D / size
        rows = _HeadRows(teacher_head_WT, student_head_WD, shard.num_valid, teacher_mean_T, student_mean_D)
        products = _all_reduce_packed(rows.products(with_teacher=previous is None), shard)
        ctx.shard = shard
        ctx.save_for_backward(teacher_head_WT, student_head_WD, teacher_mean_T, student_mean_D, size)
        teacher = [*products[2:], teacher_mean_T, size] if previous is None else []
        ctx.mark_non_differentiable(*teacher)
        return (*products[:2], student_mean_D, *teacher)

    @staticmethod
    @once_differentiable
    @full_precision()
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        teacher_head_WT, student_head_WD, teacher_mean_T, student_mean_D, size = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        # These are sums over this rank's tokens, and each token is known to one rank only.
        teacher_student_TD, student_student_DD, mean_D = _all_reduce_packed(list(upstream[:3]), shard)
        every_row_D = mean_D / size
        gradient_WD = torch.zeros_like(student_head_WD)
        rows = _HeadRows(teacher_head_WT, student_head_WD, shard.num_valid, teacher_mean_T, student_mean_D)
        # The means inside of the right factors add nothing, because the left factors' columns have none.
        for columns, teacher_CT, student_CD in rows.tiles():
            gradient_CD = exact_product(teacher_CT, teacher_student_TD)
            add_exact_product(gradient_CD, student_CD, student_student_DD).add_(every_row_D)
            gradient_WD[columns] = gradient_CD
        return gradient_WD, None, None, None


@dataclass(frozen=True, slots=True)
class _HeadRows:
    """The rows of both heads that are vocabulary, minus the column means, tile by tile."""

    teacher_head_WT: Tensor
    student_head_WD: Tensor
    num_valid: int
    teacher_mean_T: Tensor
    student_mean_D: Tensor

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, teacher's [C, T], student's [C, D]), in the dtype of the means."""
        for start in range(0, self.num_valid, ROWS_PER_TILE):
            rows = slice(start, min(start + ROWS_PER_TILE, self.num_valid))
            # Subtracted here and not from the Gram: large means would drown the rest in W' W - V m m'.
            teacher_CT, student_CD = (
                head[rows].to(mean.dtype) - mean
                for head, mean in (
                    (self.teacher_head_WT, self.teacher_mean_T),
                    (self.student_head_WD, self.student_mean_D),
                )
            )
            yield rows, teacher_CT, student_CD

    def products(self, *, with_teacher: bool) -> list[Tensor]:
        """Return this rank's part of G_TD, G_SS and, if asked, G_TT."""
        widths = self.teacher_head_WT.shape[1], self.student_head_WD.shape[1]
        shapes = [widths, (widths[1], widths[1]), (widths[0], widths[0])]
        totals = [self.student_mean_D.new_zeros(shape) for shape in shapes[: 2 + with_teacher]]
        for _, teacher_CT, student_CD in self.tiles():
            add_exact_product(totals[0], teacher_CT.T, student_CD)
            add_exact_product(totals[1], student_CD.T, student_CD)
            if with_teacher:
                add_exact_product(totals[2], teacher_CT.T, teacher_CT)
        return totals


def head_means(
    teacher_head_WT: Tensor, student_head_WD: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the column means of both heads over the whole vocabulary, [T] and [D], and its size, 0-dim.

    Collectives over `shard.group` (one rank: none): one all-reduce of [T + D + 1].
    """
    dtype = statistics_dtype(student_head_WD)
    sums = [_column_sum(student_head_WD, shard, dtype), _column_sum(teacher_head_WT, shard, dtype)]
    student_sum_D, teacher_sum_T, size = _all_reduce_packed(
        [*sums, sums[0].new_tensor(shard.num_valid)], shard
    )
    return teacher_sum_T / size, student_sum_D / size, size


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
