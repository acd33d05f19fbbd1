"""Cosine of two models' log-probability differences from Gram matrices of their heads, without any logits.

With a = N(h(l_j)) - N(h(l_j-1)) and c = lse(l_j) - lse(l_j-1), a difference of log-probabilities is W a - c 1, so
    <D^T, D^S> = a_T' G_TS a_S - c_S (a_T . u_T) - c_T (a_S . u_S) + V c_T c_S,    G_TS = W_T' W_S,  u = W' 1
    |D|^2      = a' G a - 2 c (a . u) + V c^2
The centred form removes the mean over the vocabulary: no c, and Grams of heads whose column means are removed.

Shapes: N this rank's tokens, T / S hidden width of teacher / student, W rows of this rank's head shard,
C rows of a tile, V the vocabulary.

Source: method.md, section 5. Precision (pitfalls.md, B1): differences, Grams and quadratic forms in float32.
TF32 must stay off for the log-probability form (1.5e-3 in the cosine).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fdd.ops.head_gradient import collected
from megatron_fdd.ops.vocab_shard import VocabShard
from megatron_fdd.ops.vocab_tiles import accumulate, product_dtype, statistics_dtype

ROWS_PER_TILE = 4096
# Below this share of the terms that it is the sum of, |D|^2 is rounding noise and D counts as zero.
ZERO_SHARE = 16.0


@dataclass(frozen=True, slots=True)
class HeadGrams:
    """Gram matrices and column sums over the whole vocabulary, padding left out; float32, equal on all ranks.

    `centred`: column means are removed from the matrices. `vocab_size` is a 0-dim tensor (no host sync).
    """

    teacher_teacher_TT: Tensor
    teacher_student_TS: Tensor
    student_student_SS: Tensor
    teacher_sum_T: Tensor
    student_sum_S: Tensor
    vocab_size: Tensor
    centred: bool


def head_grams(
    teacher_head_WT: Tensor,
    student_head_WS: Tensor,
    *,
    shard: VocabShard,
    centred: bool,
    previous: HeadGrams | None = None,
) -> HeadGrams:
    """Gram matrices of both heads; differentiable in the student's head where that requires a gradient.

    Under sequence parallelism the ranks' gradients of a Gram come from different tokens and are summed;
    without it every rank has the same tokens, hence the same gradient.

    Args:
        previous: an earlier result for the same teacher head: its teacher part is taken over, not computed.

    Collectives over `shard.group` (one rank: none). Forward: one all-reduce of the matrices, packed with the
        sums and the vocabulary's size; centred: of those two before, by itself. Backward: under sequence
        parallelism one all-reduce of [T S + S S + S] numbers, else none. All float32.
    """
    assert previous is None or previous.centred == centred, "the earlier Grams are of the other form"
    teacher_student_TS, student_student_SS, student_sum_S, *teacher = _HeadGrams.apply(
        collected(student_head_WS), teacher_head_WT.detach(), shard, centred, previous
    )
    if previous is not None:
        teacher = [previous.teacher_teacher_TT, previous.teacher_sum_T, previous.vocab_size]
    return HeadGrams(
        teacher_teacher_TT=teacher[0],
        teacher_student_TS=teacher_student_TS,
        student_student_SS=student_student_SS,
        teacher_sum_T=teacher[1],
        student_sum_S=student_sum_S,
        vocab_size=teacher[2],
        centred=centred,
    )


def delta_cosine(
    teacher_delta_NT: Tensor,
    student_delta_NS: Tensor,
    teacher_lse_delta_N: Tensor | None,
    student_lse_delta_N: Tensor | None,
    grams: HeadGrams,
) -> Tensor:
    """Cosine over the vocabulary of teacher's and student's differences, [N], float32 (float64 for float64).

    Gradient flows to the student's two inputs and to `grams` (trained head). Where either difference is zero, or
    zero up to rounding, there is no direction to compare: the cosine is 1 with zero gradient, never NaN.

    Args:
        teacher_delta_NT, student_delta_NS: differences of normed hidden states, taken in float32.
        teacher_lse_delta_N, student_lse_delta_N: differences of log-sum-exps at temperature 1; both None
            exactly with centred Grams.

    Collectives: none, the tokens are local. No host synchronisation.
    """
    assert (teacher_lse_delta_N is None) == (student_lse_delta_N is None) == grams.centred, (
        "form of the delta"
    )
    dtype = statistics_dtype(student_delta_NS)
    teacher, student = teacher_delta_NT.detach().to(dtype), student_delta_NS.to(dtype)
    dot_N = ((teacher @ grams.teacher_student_TS) * student).sum(1)
    teacher_form_N = ((teacher @ grams.teacher_teacher_TT) * teacher).sum(1)
    student_form_N = ((student @ grams.student_student_SS) * student).sum(1)
    if teacher_lse_delta_N is None or student_lse_delta_N is None:
        teacher_square, student_square = teacher_form_N, student_form_N
        teacher_terms, student_terms = teacher_form_N, student_form_N
    else:
        teacher_c, student_c = teacher_lse_delta_N.detach().to(dtype), student_lse_delta_N.to(dtype)
        teacher_u, student_u = teacher @ grams.teacher_sum_T, student @ grams.student_sum_S
        size = grams.vocab_size
        dot_N = dot_N - student_c * teacher_u - teacher_c * student_u + size * teacher_c * student_c
        teacher_terms = teacher_form_N + size * teacher_c**2
        student_terms = student_form_N + size * student_c**2
        teacher_square = teacher_terms - 2 * teacher_c * teacher_u
        student_square = student_terms - 2 * student_c * student_u
    share = ZERO_SHARE * torch.finfo(dtype).eps
    zero_N = (teacher_square <= share * teacher_terms) | (student_square <= share * student_terms)
    # Replaced before the root, not after: a gradient through the untaken branch would be NaN.
    safe = [square.masked_fill(zero_N, 1.0).rsqrt() for square in (teacher_square, student_square)]
    return (dot_N * safe[0] * safe[1]).masked_fill(zero_N, 1.0)


class _HeadGrams(torch.autograd.Function):
    """Gradient for the first input. Outputs: G_TS, G_SS, u_S and, without `previous`, G_TT, u_T, V."""

    @staticmethod
    def forward(
        ctx: Any,
        student_head_WS: Tensor,
        teacher_head_WT: Tensor,
        shard: VocabShard,
        centred: bool,
        previous: HeadGrams | None,
    ) -> tuple[Tensor, ...]:
        dtype = statistics_dtype(student_head_WS)
        sums = [_column_sum(student_head_WS, shard, dtype)]
        if previous is None:
            sums += [_column_sum(teacher_head_WT, shard, dtype), sums[0].new_tensor(shard.num_valid)]
        means = None
        if centred:
            sums = _all_reduce_packed(sums, shard)
            known = [previous.teacher_sum_T, previous.vocab_size] if previous is not None else []
            student_sum_S, teacher_sum_T, size = sums + known
            means = (teacher_sum_T / size, student_sum_S / size)
        rows = _HeadRows(teacher_head_WT, student_head_WS, shard.num_valid, means)
        matrices = rows.products(with_teacher=previous is None)
        if centred:
            matrices = _all_reduce_packed(matrices, shard)
        else:
            reduced = _all_reduce_packed(sums + matrices, shard)
            sums, matrices = reduced[: len(sums)], reduced[len(sums) :]
        ctx.shard, ctx.dtype = shard, dtype
        ctx.save_for_backward(teacher_head_WT, student_head_WS, *(means or ()))
        ctx.mark_non_differentiable(*matrices[2:], *sums[1:])
        return (*matrices[:2], sums[0], *matrices[2:], *sums[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        teacher_head_WT, student_head_WS, *means = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        gradients = list(upstream[:3])
        if shard.splits_tokens:
            gradients = _all_reduce_packed(gradients, shard)
        teacher_student_TS, student_student_SS, student_sum_S = gradients
        both_SS = student_student_SS + student_student_SS.T
        gradient_WS = torch.zeros_like(student_head_WS)
        rows = _HeadRows(teacher_head_WT, student_head_WS, shard.num_valid, tuple(means) or None)
        for columns, teacher_CT, student_CS in rows.tiles():
            gradient_CS = teacher_CT.to(ctx.dtype) @ teacher_student_TS
            gradient_CS.addmm_(student_CS.to(ctx.dtype), both_SS).add_(student_sum_S)
            gradient_WS[columns] = gradient_CS
        return gradient_WS, None, None, None, None


@dataclass(frozen=True, slots=True)
class _HeadRows:
    """Both heads' rows that are vocabulary, tile by tile; without their column means where those are given."""

    teacher_head_WT: Tensor
    student_head_WS: Tensor
    num_valid: int
    means: tuple[Tensor, ...] | None

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, teacher's [C, T], student's [C, S]), in the dtype that both are multiplied in."""
        heads = (self.teacher_head_WT, self.student_head_WS)
        dtype = torch.promote_types(product_dtype(heads[0]), product_dtype(heads[1]))
        for start in range(0, self.num_valid, ROWS_PER_TILE):
            rows = slice(start, min(start + ROWS_PER_TILE, self.num_valid))
            if self.means is None:
                teacher_CT, student_CS = (head[rows].to(dtype) for head in heads)
            else:
                # Subtracted here and not from the Gram: G - u u'/V would lose what the means outweigh.
                pairs = zip(heads, self.means, strict=True)
                teacher_CT, student_CS = (head[rows].to(mean.dtype) - mean for head, mean in pairs)
            yield rows, teacher_CT, student_CS

    def products(self, *, with_teacher: bool) -> list[Tensor]:
        """This rank's part of G_TS, G_SS and, if asked, G_TT."""
        widths = self.teacher_head_WT.shape[1], self.student_head_WS.shape[1]
        shapes = [widths, (widths[1], widths[1]), (widths[0], widths[0])]
        dtype = statistics_dtype(self.student_head_WS)
        totals = [self.student_head_WS.new_zeros(shape, dtype=dtype) for shape in shapes[: 2 + with_teacher]]
        for _, teacher_CT, student_CS in self.tiles():
            accumulate(totals[0], teacher_CT.T, student_CS)
            accumulate(totals[1], student_CS.T, student_CS)
            if with_teacher:
                accumulate(totals[2], teacher_CT.T, teacher_CT)
        return totals


def _column_sum(head: Tensor, shard: VocabShard, dtype: torch.dtype) -> Tensor:
    """Sum of the rows that are vocabulary; tile by tile, so that a bf16 head is never widened as a whole."""
    total = head.new_zeros(head.shape[1], dtype=dtype)
    for tile in head[: shard.num_valid].split(ROWS_PER_TILE):
        total += tile.sum(0, dtype=dtype)
    return total


def _all_reduce_packed(tensors: list[Tensor], shard: VocabShard) -> list[Tensor]:
    """Sums over ranks. Collectives: one all-reduce of all tensors together."""
    if shard.num_ranks == 1:
        return tensors
    packed = shard.all_reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
