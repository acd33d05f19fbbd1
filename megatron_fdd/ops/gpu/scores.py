"""Triton kernels of linear_kl that need the normalisers: mixtures' sums, and the gradient of the logits.

Shapes and rules: see gpu/kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_fdd.ops.gpu.kernels import logits, place, store_block


@triton.jit
def log_mixture(first, second, log_mix, log_rest):
    """log(mix e^first + (1 - mix) e^second)."""
    first, second = first + log_mix, second + log_rest
    return tl.maximum(first, second) + tl.log(1.0 + tl.exp(-tl.abs(first - second)))


@triton.jit
def summands(teacher, student, mix, log_mix, log_rest, KIND: tl.constexpr):
    """Value and score of a divergence from log-probabilities, as Divergence.summands has them."""
    if KIND == "fkl":
        mass = tl.exp(teacher)
        return mass * (teacher - student), -mass
    if KIND == "rkl":
        score = tl.exp(student) * (student - teacher)
        return score, score
    if KIND == "srkl":
        gap = student - log_mixture(student, teacher, log_mix, log_rest)
        mass = tl.exp(student)
        return mass * gap, mass * (gap + mix * (1.0 - tl.exp(gap)))
    mixed = log_mixture(teacher, student, log_mix, log_rest)
    value = tl.exp(teacher) * (teacher - mixed)
    if KIND == "sfkl":
        return value, tl.exp(student) * (1.0 - tl.exp(teacher - mixed)) * (1.0 - mix)
    score = tl.exp(student) * (student - mixed) * (1.0 - mix)
    return value * mix + score, score


@triton.jit
def mixture_kernel(
    teacher_RT, teacher_head_WT, student_RS, student_head_WS, lse_M,
    score_RC, student_RC,  # out: weights of the rows to sum
    value_BR, score_BR, largest_BM,  # out: sums of each column block; largest weight of score, then of student
    teacher_width, student_width, weights_stride, num_rows, first, stop, inverse_temperature, mix, log_mix, log_rest,
    KIND: tl.constexpr,
    TEACHER_EVEN: tl.constexpr, STUDENT_EVEN: tl.constexpr, TEACHER_WIDEN: tl.constexpr, STUDENT_WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Value and score of a divergence with a mixture, at the columns [first, stop)."""
    row_block, block = place(tl.cdiv(num_rows, ROWS), tl.cdiv(stop - first, COLUMNS), GROUP)
    rows, offset = row_block * ROWS + tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
    keep, valid = rows < num_rows, (first + offset < stop)[None, :]
    row, column = tl.minimum(rows, num_rows - 1), tl.minimum(first + offset, stop - 1)
    teacher = logits(
        teacher_RT,
        teacher_head_WT,
        teacher_width,
        row,
        column,
        TEACHER_EVEN,
        TEACHER_WIDEN,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    student = logits(
        student_RS,
        student_head_WS,
        student_width,
        row,
        column,
        STUDENT_EVEN,
        STUDENT_WIDEN,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    teacher = teacher * inverse_temperature - tl.load(lse_M + row)[:, None]
    student = student * inverse_temperature - tl.load(lse_M + num_rows + row)[:, None]
    value, score = summands(teacher, student, mix, log_mix, log_rest, KIND)
    score = tl.where(valid, score, 0.0)
    at = block * num_rows + rows
    tl.store(value_BR + at, tl.sum(tl.where(valid, value, 0.0), 1), mask=keep)
    tl.store(score_BR + at, tl.sum(score, 1), mask=keep)
    if score_RC is not None:
        mass = tl.where(valid, tl.exp(student), 0.0)
        store_block(score_RC, score, row, offset, weights_stride, keep)
        store_block(student_RC, mass, row, offset, weights_stride, keep)
        if largest_BM is not None:
            at += block * num_rows
            tl.store(largest_BM + at, tl.max(tl.abs(score), 1), mask=keep)
            tl.store(largest_BM + num_rows + at, tl.max(mass, 1), mask=keep)


@triton.jit
def gradient_kernel(
    teacher_RT, teacher_head_WT, student_RS, student_head_WS, lse_M, unit_lse_R,
    scale_R, own_R, unit_R,  # factors of the score, of the student's probability, of that at temperature 1
    label_R, label_scale_R,  # ids relative to the shard, and what is subtracted there
    gradient_RC,  # out
    teacher_width, student_width, weights_stride, num_rows, first, stop,
    inverse_temperature, temperature, mix, log_mix, log_rest,
    KIND: tl.constexpr,
    TEACHER_EVEN: tl.constexpr, STUDENT_EVEN: tl.constexpr, TEACHER_WIDEN: tl.constexpr, STUDENT_WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradient of the student's logits at the columns [first, stop).

    Without a teacher KIND is None and the student's lse is the one at temperature 1. Pointers that are None are
    left out.
    """
    row_block, block = place(tl.cdiv(num_rows, ROWS), tl.cdiv(stop - first, COLUMNS), GROUP)
    rows, offset = row_block * ROWS + tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
    keep, valid = rows < num_rows, (first + offset < stop)[None, :]
    row, column = tl.minimum(rows, num_rows - 1), tl.minimum(first + offset, stop - 1)
    if KIND is not None:
        teacher = inverse_temperature * logits(
            teacher_RT,
            teacher_head_WT,
            teacher_width,
            row,
            column,
            TEACHER_EVEN,
            TEACHER_WIDEN,
            ROWS,
            COLUMNS,
            DEPTH,
        )
    student = inverse_temperature * logits(
        student_RS,
        student_head_WS,
        student_width,
        row,
        column,
        STUDENT_EVEN,
        STUDENT_WIDEN,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    if KIND is not None:
        student_log = student - tl.load(lse_M + num_rows + row)[:, None]
        teacher_log = teacher - tl.load(lse_M + row)[:, None]
        value, score = summands(teacher_log, student_log, mix, log_mix, log_rest, KIND)
        gradient = (
            score * tl.load(scale_R + row)[:, None] + tl.exp(student_log) * tl.load(own_R + row)[:, None]
        )
    else:
        gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
    if unit_R is not None:
        unit_log = student * temperature - tl.load(unit_lse_R + row)[:, None]
        gradient += tl.exp(unit_log) * tl.load(unit_R + row)[:, None]
    if label_R is not None:
        hit = (first + offset).to(tl.int64)[None, :] == tl.load(label_R + row)[:, None]
        gradient -= tl.where(hit, tl.load(label_scale_R + row)[:, None], 0.0)
    gradient = tl.where(valid, gradient, 0.0)
    store_block(gradient_RC, gradient, row, offset, weights_stride, keep)
