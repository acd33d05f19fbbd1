"""Cosine of two models' log-probability differences from Gram matrices of their heads, without any logits.

With a = N(h(l_j)) - N(h(l_j-1)) and c = lse(l_j) - lse(l_j-1), a difference of log-probabilities is D = W a - c 1. With
the head's column means m = W' 1 / V and the head without them, C = W - 1 m', its mean over the vocabulary is apart:
    D = C a - e 1,    e = c - a . m,    C' 1 = 0
    <D^T, D^S> = a_T' G_TD a_S + V e_T e_S,    G_TD = C_T' C_S
    |D|^2      = a' G a + V e^2
The centred form removes the mean: it has no e.

Shapes: N this rank's tokens, n the part of them that it computes, T / D hidden width of teacher / student,
V the vocabulary.

Source: docs/method.md. Precision: differences, Grams and quadratic forms are float32, on a GPU sums of three products
of bf16 parts, which cost 3e-6 in the cosine; a single one would cost 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fdd.ops.capped_change import TeacherChange, capped_change
from megatron_fdd.ops.full_precision import exact_product, full_precision
from megatron_fdd.ops.head_grams import HeadGrams, head_grams
from megatron_fdd.ops.vocab_shard import VocabShard
from megatron_fdd.ops.vocab_tiles import statistics_dtype

__all__ = [
    "DeltaGradient",
    "HeadGrams",
    "TeacherChange",
    "capped_change",
    "delta_cosine",
    "delta_cosine_gradient",
    "head_grams",
]

# Where all logits rise alike, D is only what c leaves of their mean, and c comes from rounded log-sum-exps. |D|^2 below
# this multiple of the rounding error of V mean^2 may be noise, and D counts as zero.
ZERO_SHARE = 16.0


def delta_cosine(
    teacher_delta_NT: Tensor | TeacherChange,
    student_delta_ND: Tensor,
    teacher_lse_delta_N: Tensor | None,
    student_lse_delta_N: Tensor | None,
    grams: HeadGrams,
    *,
    student_later_ND: Tensor | None = None,
) -> Tensor:
    """Return the cosine over the vocabulary of teacher's and student's differences, [N], float32 (float64 for float64).

    Gradient flows to the student's two inputs and, with a trained head, to `grams`, which gets the gradient of only
    the n tokens that this rank computes. Where either difference is zero, or zero up to rounding, there is no
    direction to compare: the cosine is 1 with zero gradient, never NaN. Not differentiable twice.

    Each token costs three products, [T, T], [T, D] and [D, D], and for a trained head two outer products in the
    backward pass. Kept for the backward pass: [n, D], and for a trained head the differences, [n, T + D], and
    `student_later_ND`.

    Args:
        teacher_delta_NT, student_delta_ND: differences of normed hidden states, taken in float32. A teacher whose
            logits have a soft cap gives its `capped_change` in place of the first.
        teacher_lse_delta_N, student_lse_delta_N: differences of log-sum-exps at temperature 1, for log-probabilities;
            both None: the centred form, which removes the mean over the vocabulary.
        grams: the Grams of the heads, with their shard. With `shard.sequence_parallel` each rank has tokens of its own.
            Otherwise all ranks pass the same N tokens, rank r computes ceil(N / ranks) of them from
            r * ceil(N / ranks) on, and all ranks must hand back the same upstream gradient.
        student_later_ND: normed hidden states of the later layer, if the earlier end of the difference is a constant as
            a whole: the head's gradient is then that of the later end alone. None: of both ends. The gradient for
            hidden states and log-sum-exps follows from how the caller made the differences.

    Collectives over `grams.shard.group` without sequence parallelism (with it, or with one rank: none). Forward: one
        all-gather of [n]. Backward: one all-gather of [n, D + 1] ([n, D] centred), n = ceil(N / ranks). They are in
        float32, the inputs' dtype: a narrower one would round what a single rank does not round.
    """
    assert (teacher_lse_delta_N is None) == (student_lse_delta_N is None), "form of the delta"
    constant: Tensor | TeacherChange
    if isinstance(teacher_delta_NT, TeacherChange):
        teacher_student, constant = teacher_delta_NT.on_student_nD, teacher_delta_NT.detach()
    else:
        teacher_student, constant = grams.teacher_student_TD, teacher_delta_NT.detach()
    return _DeltaCosine.apply(
        student_delta_ND,
        student_lse_delta_N,
        teacher_student,
        grams.student_student_DD,
        grams.student_mean_D,
        _Constants(
            constant,
            None if teacher_lse_delta_N is None else teacher_lse_delta_N.detach(),
            None if student_later_ND is None else student_later_ND.detach(),
            grams,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Constants:
    """Inputs without a gradient; from `grams` only the teacher's part and the shard are read."""

    teacher_delta_NT: Tensor | TeacherChange
    teacher_lse_delta_N: Tensor | None
    student_later_ND: Tensor | None
    grams: HeadGrams

    def teacher(self, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, TeacherChange]:
        """Return the teacher's differences [n, T], None under a cap, and what the cosine needs of them.

        Args:
            factor: what brings the gradient to the student's head: G_TD [T, D], of which `grams.factors` is read, or
                under a cap C_S' u [n, D].
        """
        change, grams = self.teacher_delta_NT, self.grams
        if isinstance(change, TeacherChange):
            return None, change._replace(on_student_nD=factor.clone())
        teacher_nT = grams.shard.token_share(change).to(dtype)
        teacher_teacher, teacher_student, _ = grams.factors
        form_n = (exact_product(teacher_nT, teacher_teacher) * teacher_nT).sum(1)
        return teacher_nT, TeacherChange(
            exact_product(teacher_nT, teacher_student), teacher_nT @ grams.teacher_mean_T, form_n
        )


class DeltaGradient(NamedTuple):
    """The cosine of N tokens and its derivatives, all without gradient, float32 (float64 for float64)."""

    cosine_N: Tensor
    by_student_ND: Tensor  # by the student's difference of hidden states
    by_lse_N: Tensor  # by the student's difference of log-sum-exps


@torch.no_grad()
def delta_cosine_gradient(
    teacher_delta_NT: Tensor,
    student_delta_ND: Tensor,
    teacher_lse_delta_N: Tensor,
    student_lse_delta_N: Tensor,
    grams: HeadGrams,
) -> DeltaGradient:
    """Return what `delta_cosine` returns for log-probabilities, with its derivatives at once, for constant heads.

    Collectives over `grams.shard.group` without sequence parallelism (with it, or with one rank: none): one all-gather
        of [n, D + 2], n = ceil(N / ranks), in float32.
    """
    constants = _Constants(teacher_delta_NT, teacher_lse_delta_N, None, grams)
    forms = _forms(student_delta_ND, student_lse_delta_N, grams.teacher_student_TD, constants)
    parts = [forms.cosine_n[:, None], forms.gradient_nD, forms.lse_gradient_n[:, None]]
    cosine_N1, gradient_ND, lse_gradient_N1 = _all_tokens(parts, len(student_delta_ND), grams.shard)
    return DeltaGradient(cosine_N1[:, 0], gradient_ND, lse_gradient_N1[:, 0])


class _Forms(NamedTuple):
    """The cosine of the n tokens that this rank computes, its derivatives, and their factors."""

    cosine_n: Tensor
    gradient_nD: Tensor
    lse_gradient_n: Tensor
    teacher_nT: Tensor | None
    student_nD: Tensor
    scale_n: Tensor
    shrink_n: Tensor


@full_precision()
def _forms(
    student_delta_ND: Tensor,
    student_lse_delta_N: Tensor | None,
    teacher_student: Tensor,
    constants: _Constants,
) -> _Forms:
    """Compute the cosine and its derivatives. `teacher_student`: see `_Constants.teacher`."""
    grams = constants.grams
    shard, size, student_mean_D = grams.shard, grams.vocab_size, grams.student_mean_D
    dtype = statistics_dtype(student_delta_ND)
    teacher_nT, (from_teacher_nD, teacher_mean_n, teacher_form_n) = constants.teacher(teacher_student, dtype)
    student_nD = shard.token_share(student_delta_ND).to(dtype)
    from_student_nD = exact_product(student_nD, grams.factors[2])
    student_mean_n = student_nD @ student_mean_D
    teacher_e_n = _rest(constants.teacher_lse_delta_N, teacher_mean_n, shard)
    student_e_n = _rest(student_lse_delta_N, student_mean_n, shard)
    student_form_n = (from_student_nD * student_nD).sum(1)
    cosine_n, scale_n, shrink_n = _cosine(
        (from_teacher_nD * student_nD).sum(1) + size * teacher_e_n * student_e_n,
        square_and_zero(teacher_form_n, teacher_e_n, teacher_mean_n, size),
        square_and_zero(student_form_n, student_e_n, student_mean_n, size),
    )
    # d cos = scale d<D^T, D^S> - shrink d|D^S|^2 / 2; G_SS is symmetric, and d e = d c - m . d a.
    lse_gradient_n = size * (scale_n * teacher_e_n - shrink_n * student_e_n)
    gradient_nD = from_teacher_nD.mul_(scale_n[:, None]).sub_(from_student_nD.mul_(shrink_n[:, None]))
    gradient_nD.addr_(lse_gradient_n, student_mean_D, alpha=-1)
    return _Forms(cosine_n, gradient_nD, lse_gradient_n, teacher_nT, student_nD, scale_n, shrink_n)


class _DeltaCosine(torch.autograd.Function):
    """Gradient for all inputs but the last. Its factors are computed forward, where their products exist anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        student_delta_ND: Tensor,
        student_lse_delta_N: Tensor | None,
        teacher_student: Tensor,
        _student_student_DD: Tensor,
        _student_mean_D: Tensor,
        constants: _Constants,
    ) -> Tensor:
        shard = constants.grams.shard
        forms = _forms(student_delta_ND, student_lse_delta_N, teacher_student, constants)
        kept: tuple[Tensor | None, ...] = ()
        if any(ctx.needs_input_grad[2:5]):
            later_ND, later_nD = constants.student_later_ND, forms.student_nD
            if later_ND is not None:
                later_nD = shard.token_share(later_ND).to(later_nD.dtype)
            kept = (forms.teacher_nT, forms.student_nD, later_nD, forms.scale_n, forms.shrink_n)
        ctx.save_for_backward(forms.gradient_nD, forms.lse_gradient_n[:, None], *kept)
        ctx.shard = shard
        return shard.join_shares(forms.cosine_n, len(student_delta_ND))

    @staticmethod
    @once_differentiable
    @full_precision()
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        gradient_nD, lse_gradient_n1, *kept = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        upstream_n1 = shard.token_share(upstream_N)[:, None]
        gradient_ND = lse_gradient_N = None
        if ctx.needs_input_grad[1]:
            gradient_ND, lse_gradient_N1 = _all_tokens(
                [upstream_n1 * gradient_nD, upstream_n1 * lse_gradient_n1], len(upstream_N), shard
            )
            lse_gradient_N = lse_gradient_N1[:, 0]
        elif ctx.needs_input_grad[0]:
            (gradient_ND,) = _all_tokens([upstream_n1 * gradient_nD], len(upstream_N), shard)
        if not kept:
            return gradient_ND, lse_gradient_N, None, None, None, None
        # d cos = (scale D^T - shrink D^S) . d D^S, and a change dW of the head makes d D^S = dW a. Here a is the
        # difference, or its later end if the other is a constant: it is the right factor of all three products.
        teacher_nT, student_nD, later_nD, scale_n, shrink_n = kept
        factor_nD = upstream_n1 * later_nD
        teacher_nD = scale_n[:, None] * factor_nD
        return (
            gradient_ND,
            lse_gradient_N,
            teacher_nD if teacher_nT is None else exact_product(teacher_nT.T, teacher_nD),
            exact_product(student_nD.T, -shrink_n[:, None] * factor_nD),
            factor_nD.T @ -lse_gradient_n1[:, 0],
            None,
        )


def _rest(lse_delta_N: Tensor | None, mean_n: Tensor, shard: VocabShard) -> Tensor:
    """Return e = c - a . m of this rank's tokens, [n]; zeros in the centred form."""
    if lse_delta_N is None:
        return torch.zeros_like(mean_n)
    return shard.token_share(lse_delta_N).to(mean_n.dtype) - mean_n


def square_and_zero(form_n: Tensor, e_n: Tensor, mean_n: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return |D|^2, and where it counts as zero."""
    square_n = form_n + size * e_n**2
    share = ZERO_SHARE * torch.finfo(square_n.dtype).eps
    return square_n, square_n <= share * size * mean_n**2


def _cosine(
    dot_n: Tensor, teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosine and its derivatives: by the dot product, and by half of the student's square, negated.

    `teacher` and `student` are what `square_and_zero` returns.
    """
    zero_n = teacher[1] | student[1]
    # Replaced before the root, because the root of rounding noise may be NaN.
    teacher_root_n, student_root_n = (part[0].masked_fill(zero_n, 1.0).rsqrt() for part in (teacher, student))
    scale_n = (teacher_root_n * student_root_n).masked_fill(zero_n, 0.0)
    cosine_n = dot_n * teacher_root_n * student_root_n
    shrink_n = (cosine_n * student_root_n**2).masked_fill(zero_n, 0.0)
    return cosine_n.masked_fill(zero_n, 1.0), scale_n, shrink_n


def _all_tokens(parts: list[Tensor], num_tokens: int, shard: VocabShard) -> list[Tensor]:
    """Join the ranks' tokens of all parts. Collectives: one all-gather of all parts, if ranks share tokens."""
    if not shard.shares_tokens:
        return parts
    whole = shard.join_shares(torch.cat(parts, dim=1), num_tokens)
    return [part.contiguous() for part in whole.split([part.shape[1] for part in parts], dim=1)]
