"""Triton kernels that read a token's logits from end to end, however many there are: one launch a pass.

A program has one token and goes through its logits, COLUMNS at a time. Sums are kept for every lane (the columns that
are COLUMNS apart) and put together once, at the end, so that no step waits for another thread. A tile of the vocabulary
and held logits of the whole vocabulary are the same to these kernels.

Shapes and pointers: see gpu/kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_fdd.ops.gpu.kernels import read_logits, slope_of, store_row


@triton.jit
def fold_lanes(logits, peak, mass, unit_mass, temperature, HAS_UNIT: tl.constexpr):
    """Add a number to the statistics of every lane, at the cost of one exponential.

    Returns the new statistics; the factor of sums relative to the old peak, and the number's own factor.
    """
    rises = logits > peak
    gap = -tl.abs(logits - peak)
    factor = tl.exp(gap)
    old, new = tl.where(rises, factor, 1.0), tl.where(rises, 1.0, factor)
    if HAS_UNIT:
        unit_factor = tl.exp(gap * temperature)
        unit_mass = unit_mass * tl.where(rises, unit_factor, 1.0) + tl.where(rises, 1.0, unit_factor)
    return tl.maximum(peak, logits), mass * old + new, unit_mass, old, new


@triton.jit
def add_lanes(peak_M, mass_M, unit_mass_M, at, lane_peak, lane_mass, lane_unit_mass, temperature):
    """Add all lanes to a row's statistics. Returns the factor of each lane's sums, and that of the row's."""
    before = tl.load(peak_M + at)
    peak = tl.maximum(before, tl.max(lane_peak, 0))
    gap, drop = lane_peak - peak, before - peak
    shares, shrink = tl.exp(gap), tl.exp(drop)
    tl.store(peak_M + at, peak)
    tl.store(mass_M + at, tl.load(mass_M + at) * shrink + tl.sum(lane_mass * shares, 0))
    if unit_mass_M is not None:
        unit = tl.sum(lane_unit_mass * tl.exp(gap * temperature), 0)
        tl.store(unit_mass_M + at, tl.load(unit_mass_M + at) * tl.exp(drop * temperature) + unit)
    return shares, shrink


@triton.jit
def statistics_kernel(
    teacher_RC, student_RC, teacher_bias_C, teacher_cap, student_bias_C, student_cap,
    peak_M, mass_M, unit_mass_M, cross_R,  # statistics of the columns so far, in place (see SoftmaxSums)
    peaks_KM,  # out: the largest logit of every COLUMNS
    stride, num_rows, num_columns, inverse_temperature, temperature,
    LEAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add a row's exponentials to both models' statistics. LEAD: as in `softmax_kernel`; None: there is no `cross`."""
    row, lane = tl.program_id(0), tl.arange(0, COLUMNS)
    HAS_UNIT: tl.constexpr = unit_mass_M is not None
    at = row if teacher_RC is None else num_rows + row
    num_statistics = num_rows if teacher_RC is None else 2 * num_rows
    nothing = tl.zeros((COLUMNS,), tl.float32)
    unseen = nothing - 1e30  # as beyond the last column: its exponential is 0
    student_peak, student_mass, student_unit = unseen, nothing, nothing
    teacher_peak, teacher_mass, teacher_unit, cross = unseen, nothing, nothing, nothing
    for start in range(0, num_columns, COLUMNS):
        column = start + lane
        student = read_logits(
            student_RC, student_bias_C, student_cap, row, stride, column, num_columns, inverse_temperature
        )
        if peaks_KM is not None:
            tl.store(peaks_KM + start // COLUMNS * num_statistics + at, tl.max(student, 0))
        student_peak, student_mass, student_unit, old, new = fold_lanes(
            student, student_peak, student_mass, student_unit, temperature, HAS_UNIT
        )
        if teacher_RC is not None:
            teacher = read_logits(
                teacher_RC, teacher_bias_C, teacher_cap, row, stride, column, num_columns, inverse_temperature
            )
            if peaks_KM is not None:
                tl.store(peaks_KM + start // COLUMNS * num_statistics + row, tl.max(teacher, 0))
            if LEAD == "student":
                cross = cross * old + new * (student - teacher)
            teacher_peak, teacher_mass, teacher_unit, old, new = fold_lanes(
                teacher, teacher_peak, teacher_mass, teacher_unit, temperature, HAS_UNIT
            )
            if LEAD == "teacher":
                cross = cross * old + new * (student - teacher)
    shares, shrink = add_lanes(
        peak_M, mass_M, unit_mass_M, at, student_peak, student_mass, student_unit, temperature
    )
    if LEAD == "student":
        tl.store(cross_R + row, tl.load(cross_R + row) * shrink + tl.sum(cross * shares, 0))
    if teacher_RC is not None:
        shares, shrink = add_lanes(
            peak_M, mass_M, unit_mass_M, row, teacher_peak, teacher_mass, teacher_unit, temperature
        )
    if LEAD == "teacher":
        tl.store(cross_R + row, tl.load(cross_R + row) * shrink + tl.sum(cross * shares, 0))


@triton.jit
def second_kernel(
    teacher_RC, student_RC, teacher_bias_C, teacher_cap, student_bias_C, student_cap, lse_M,
    score_RC, weights_RC,  # out: weights of the rows to sum; None: not needed
    value_R, score_R,  # sums, in place
    stride, out_stride, num_rows, num_columns, inverse_temperature, mix, log_mix, log_rest,
    VALUE_AND_SCORE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum value and score of a divergence, which VALUE_AND_SCORE computes from log-probabilities."""
    row, lane = tl.program_id(0), tl.arange(0, COLUMNS)
    teacher_lse, student_lse = tl.load(lse_M + row), tl.load(lse_M + num_rows + row)
    values, scores = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, num_columns, COLUMNS):
        column = start + lane
        inside = column < num_columns
        teacher = read_logits(
            teacher_RC, teacher_bias_C, teacher_cap, row, stride, column, num_columns, inverse_temperature
        )
        student = read_logits(
            student_RC, student_bias_C, student_cap, row, stride, column, num_columns, inverse_temperature
        )
        slope = slope_of(student, student_cap, column, num_columns, inverse_temperature)
        teacher = tl.where(inside, teacher - teacher_lse, 0.0)
        student = tl.where(inside, student - student_lse, 0.0)
        value, score = VALUE_AND_SCORE(teacher, student, mix, log_mix, log_rest)
        values += tl.where(inside, value, 0.0)
        scores += tl.where(inside, score, 0.0)
        if score_RC is not None:
            tl.debug_barrier()  # the stores overwrite what other threads load
            store_row(score_RC, score * slope, row, out_stride, column, num_columns)
            store_row(weights_RC, tl.exp(student) * slope, row, out_stride, column, num_columns)
    tl.store(value_R + row, tl.load(value_R + row) + tl.sum(values, 0))
    tl.store(score_R + row, tl.load(score_R + row) + tl.sum(scores, 0))


@triton.jit
def gradient_kernel(
    teacher_RC, student_RC, teacher_bias_C, teacher_cap, student_bias_C, student_cap, lse_M, unit_lse_R,
    scale_R, own_R, unit_R,  # factors of the score, the student's probability, the same at temperature 1
    label_R, label_scale_R,  # ids relative to the shard, and what is subtracted there
    gradient_RC,  # out
    stride, out_stride, num_rows, num_columns, first, inverse_temperature, mix, log_mix, log_rest,
    VALUE_AND_SCORE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the student's logits. Without a teacher VALUE_AND_SCORE is None.

    It may overwrite the logits: numbers of the gradient are at most as wide, so that what is written at one time is
    where logits were read at that time or before.
    """
    row, lane = tl.program_id(0), tl.arange(0, COLUMNS)
    if VALUE_AND_SCORE is not None:
        teacher_lse, student_lse = tl.load(lse_M + row), tl.load(lse_M + num_rows + row)
        scale, own = tl.load(scale_R + row), tl.load(own_R + row)
    if unit_R is not None:
        unit, unit_lse = tl.load(unit_R + row), tl.load(unit_lse_R + row)
    if label_R is not None:
        label, label_scale = tl.load(label_R + row), tl.load(label_scale_R + row)
    for start in range(0, num_columns, COLUMNS):
        column = start + lane
        student = read_logits(student_RC, student_bias_C, student_cap, row, stride, column, num_columns, 1.0)
        gradient = tl.zeros((COLUMNS,), tl.float32)
        if VALUE_AND_SCORE is not None:
            teacher = read_logits(
                teacher_RC, teacher_bias_C, teacher_cap, row, stride, column, num_columns, inverse_temperature
            )
            student_log = student * inverse_temperature - student_lse
            value, score = VALUE_AND_SCORE(teacher - teacher_lse, student_log, mix, log_mix, log_rest)
            gradient = score * scale + tl.exp(student_log) * own
        if unit_R is not None:
            gradient += tl.exp(student - unit_lse) * unit
        if student_cap is not None:
            gradient *= slope_of(student, student_cap, column, num_columns, 1.0)
        if label_R is not None:
            gradient -= tl.where((first + column).to(tl.int64) == label, label_scale, 0.0)
        tl.debug_barrier()  # the stores overwrite what other threads load
        store_row(gradient_RC, gradient, row, out_stride, column, num_columns)
