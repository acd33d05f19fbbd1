"""The Triton kernel that turns a tile's logits, between two matrix products, into weights and sums in one pass.

A program has one token and holds the token's logits of the tile in registers. It overwrites what it has read: weights
in the products' dtype begin where the row's logits began (rows of bf16 weights lie twice as far apart as they need).
What it shares with the kernels of gpu/row_kernels.py is here too.

Shapes: R tokens, M rows = R per model (teacher's first, student's last), C columns of a tile. A pointer's name ends in
the shape of its target; rows of logits are `stride` numbers apart, rows of weights `out_stride`, those at temperature 1
`unit_stride`. Every row has memory for a multiple of 16 columns (`vocab_tiles.row_stride`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_mixture(first, second, log_mix, log_rest):
    """Return log(mix e^first + (1 - mix) e^second)."""
    first, second = first + log_mix, second + log_rest
    return tl.maximum(first, second) + tl.log(1.0 + tl.exp(-tl.abs(first - second)))


# Value and score of the divergences from log-probabilities, as in `DIVERGENCES` for torch, all with the same arguments.


@triton.jit
def fkl(teacher, student, mix, log_mix, log_rest):
    """Return value and score of KL(T || S)."""
    mass = tl.exp(teacher)
    return mass * (teacher - student), -mass


@triton.jit
def rkl(teacher, student, mix, log_mix, log_rest):
    """Return value and score of KL(S || T)."""
    score = tl.exp(student) * (student - teacher)
    return score, score


@triton.jit
def jsd(teacher, student, mix, log_mix, log_rest):
    """Return value and score of mix KL(T || M) + (1 - mix) KL(S || M), M = mix T + (1 - mix) S."""
    mixed = log_mixture(teacher, student, log_mix, log_rest)
    value = tl.exp(teacher) * (teacher - mixed)
    score = tl.exp(student) * (student - mixed) * (1.0 - mix)
    return value * mix + score, score


@triton.jit
def sfkl(teacher, student, mix, log_mix, log_rest):
    """Return value and score of KL(T || mix T + (1 - mix) S)."""
    mixed = log_mixture(teacher, student, log_mix, log_rest)
    value = tl.exp(teacher) * (teacher - mixed)
    return value, tl.exp(student) * (1.0 - tl.exp(teacher - mixed)) * (1.0 - mix)


@triton.jit
def srkl(teacher, student, mix, log_mix, log_rest):
    """Return value and score of KL(S || mix S + (1 - mix) T)."""
    gap = student - log_mixture(student, teacher, log_mix, log_rest)
    mass = tl.exp(student)
    return mass * gap, mass * (gap + mix * (1.0 - tl.exp(gap)))


@triton.jit
def in_row(column, num_columns):
    """Tell which columns a row has memory for. This mask goes by 16, so that 16 bytes are read and written at once."""
    return column < tl.cdiv(num_columns, 16) * 16


@triton.jit
def load_row(logits_RC, row, stride, column, num_columns, factor):
    """Load a token's logits times a factor; beyond the last column, a number whose exponential is 0."""
    places = logits_RC + row.to(tl.int64) * stride + column
    logits = tl.load(places, mask=in_row(column, num_columns), other=0.0)
    return tl.where(column < num_columns, logits, -1e30) * factor


@triton.jit
def read_logits(products_RC, bias_C, cap, row, stride, column, num_columns, factor):
    """Read a token's products with a head, as logits times a factor (see `HeadExtras`)."""
    logits, inside = load_row(products_RC, row, stride, column, num_columns, 1.0), column < num_columns
    if bias_C is not None:
        logits += tl.load(bias_C + column, mask=inside, other=0.0)
    if cap is not None:
        shrunk = tl.exp(-2.0 / cap * tl.abs(logits))
        size = cap * (1.0 - shrunk) / (1.0 + shrunk)
        logits = tl.where(inside, tl.where(logits < 0.0, -size, size), logits)
    return logits * factor


@triton.jit
def slope_of(logits, cap, column, num_columns, factor):
    """Return the derivative of what `read_logits` returned, over the factor, with respect to the products."""
    slope = 1.0
    if cap is not None:
        part = tl.where(column < num_columns, logits / (cap * factor), 0.0)
        slope = 1.0 - part * part
    return slope


@triton.jit
def store_row(weights_RC, block, row, out_stride, column, num_columns):
    """Store a token's weights, in their own dtype."""
    places = weights_RC + row.to(tl.int64) * out_stride + column
    tl.store(places, block.to(weights_RC.dtype.element_ty), mask=in_row(column, num_columns))


@triton.jit
def fold_row(logits, at, peak_M, mass_M, unit_mass_M, reference_M, temperature, limit):
    """Add a tile to one model's statistics.

    Returns exponentials relative to the running peak, the factor for the old sums, the running peak, that peak minus
    the row's reference, and the reference before this tile minus this one. Weights are relative to the reference,
    which is the first tile's peak until a logit exceeds it by more than `limit`.
    """
    before = tl.load(peak_M + at)
    peak = tl.maximum(before, tl.max(logits, 0))
    weights = tl.exp(logits - peak)
    shrink = tl.exp(before - peak)
    tl.store(peak_M + at, peak)
    tl.store(mass_M + at, tl.load(mass_M + at) * shrink + tl.sum(weights, 0))
    if unit_mass_M is not None:
        unit = tl.sum(tl.exp((logits - peak) * temperature), 0)
        unit_shrink = tl.exp((before - peak) * temperature)
        tl.store(unit_mass_M + at, tl.load(unit_mass_M + at) * unit_shrink + unit)
    old = tl.load(reference_M + at)
    reference = tl.where(peak - old <= limit, old, peak)
    tl.store(reference_M + at, reference)
    return weights, shrink, peak, peak - reference, old - reference


@triton.jit
def rescale_row(rows_MD, at, width, drop, COLUMNS: tl.constexpr):
    """Multiply a row of sums by exp(drop), if the drop is not 0, which it hardly ever is."""
    if drop != 0.0:
        factor = tl.exp(drop)
        column = tl.arange(0, COLUMNS)
        for start in range(0, width, COLUMNS):
            places = rows_MD + at.to(tl.int64) * width + start + column
            inside = start + column < width
            tl.store(places, tl.load(places, mask=inside, other=0.0) * factor, mask=inside)


@triton.jit
def softmax_kernel(
    teacher_RC, student_RC, teacher_bias_C, teacher_cap, student_bias_C, student_cap,
    first_RC, weights_RC, unit_RC,  # out: weights of the rows to sum
    peak_M, mass_M, unit_mass_M, cross_R,  # statistics of the tiles so far, in place (see SoftmaxSums)
    reference_M,  # what weights are relative to, in place
    rows_MD, unit_rows_RD, width,  # the sums of rows so far, which become relative to the new reference
    gap_M,  # out: the tile's own peak minus the running one
    stride, out_stride, unit_stride, num_rows, num_columns, inverse_temperature, temperature, limit,
    LEAD: tl.constexpr, COLUMNS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the exponentials of a tile, and add their sums to the sums of earlier tiles and of earlier rows.

    LEAD: the model under which `cross` is the expectation, "teacher", "student" or None. Pointers that are None are
    left out. All weights are the student's except `first_RC`, which has the leading model's; if the student leads,
    times z_S - z_T. A soft cap of the student's logits multiplies them by its slope.
    """
    row, column = tl.program_id(0), tl.arange(0, COLUMNS)
    student = read_logits(
        student_RC, student_bias_C, student_cap, row, stride, column, num_columns, inverse_temperature
    )
    slope = slope_of(student, student_cap, column, num_columns, inverse_temperature)
    at = row if teacher_RC is None else num_rows + row
    if teacher_RC is not None:
        teacher = read_logits(
            teacher_RC, teacher_bias_C, teacher_cap, row, stride, column, num_columns, inverse_temperature
        )
        weights, shrink, peak, rise, drop = fold_row(
            teacher, row, peak_M, mass_M, unit_mass_M, reference_M, temperature, limit
        )
        if gap_M is not None:
            tl.store(gap_M + row, tl.max(teacher, 0) - peak)
        if LEAD == "teacher":
            cross = tl.sum(weights * (student - teacher), 0)
            tl.store(cross_R + row, tl.load(cross_R + row) * shrink + cross)
            store_row(first_RC, weights * tl.exp(rise) * slope, row, out_stride, column, num_columns)
            rescale_row(rows_MD, row, width, drop, SUM_COLUMNS)
    weights, shrink, peak, rise, drop = fold_row(
        student, at, peak_M, mass_M, unit_mass_M, reference_M, temperature, limit
    )
    if gap_M is not None:
        tl.store(gap_M + at, tl.max(student, 0) - peak)
    if LEAD == "student":
        product = weights * (student - teacher)
        tl.store(cross_R + row, tl.load(cross_R + row) * shrink + tl.sum(product, 0))
        store_row(first_RC, product * tl.exp(rise) * slope, row, out_stride, column, num_columns)
    if weights_RC is not None:
        store_row(weights_RC, weights * tl.exp(rise) * slope, row, out_stride, column, num_columns)
    if unit_RC is not None:
        unit = tl.exp((student - peak + rise) * temperature)
        store_row(unit_RC, unit * slope, row, unit_stride, column, num_columns)
        rescale_row(unit_rows_RD, row, width, drop * temperature, SUM_COLUMNS)
    if rows_MD is not None:
        if LEAD is None:  # there are sums of the student alone
            at = row
        rescale_row(rows_MD, at, width, drop, SUM_COLUMNS)
        if LEAD == "student":
            rescale_row(rows_MD, row, width, drop, SUM_COLUMNS)
