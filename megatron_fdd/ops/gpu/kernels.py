"""Triton kernels of linear_kl: blocks of logits that are weighed where they arise and never reach memory.

Shapes: R tokens, M rows = R per model (teacher's first, student's last), C columns of a tile of the vocabulary,
B column blocks of that tile, T / S hidden width of teacher / student, W rows of a head. A pointer's name has the
shape of what it points to, row-major (weights have rows of `weights_stride`). A block is [ROWS, COLUMNS]; its
products are summed DEPTH numbers at a time, in float32.

Rows and columns beyond the last one repeat it, so that loads need no mask; what they give is dropped. Nothing
is added atomically: results do not depend on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(num_row_blocks, num_column_blocks, GROUP: tl.constexpr):
    """Row and column block of this program; GROUP row blocks share the columns that the cache holds."""
    index = tl.program_id(0)
    per_group = GROUP * num_column_blocks
    first = index // per_group * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    return first + index % per_group % size, index % per_group // size


@triton.jit
def multiply(left, right, total, WIDEN: tl.constexpr):
    """total + left @ right. WIDEN: half-precision numbers become float32 first."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def logits(
    hidden, head, width, row, column,
    EVEN: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of hidden @ head.T, at rows `row` and columns `column`. EVEN: width is a multiple of DEPTH."""
    depth = tl.arange(0, DEPTH)
    left = hidden + row.to(tl.int64)[:, None] * width + depth[None, :]
    right = head + column.to(tl.int64)[None, :] * width + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        if EVEN:
            left_block, right_block = tl.load(left), tl.load(right)
        else:
            inside = depth < width - start
            left_block = tl.load(left, mask=inside[None, :], other=0.0)
            right_block = tl.load(right, mask=inside[:, None], other=0.0)
        total = multiply(left_block, right_block, total, WIDEN)
        left += DEPTH
        right += DEPTH
    return total


@triton.jit
def reference(peak, before, limit):
    """What exponentials are relative to: the peak of earlier tiles, unless this block's is far above it."""
    return tl.where(peak - before <= limit, before, peak)


@triton.jit
def store_block(weights_RC, block, row, column, weights_stride, keep):
    """Store a block in the dtype of the weights."""
    places = weights_RC + row.to(tl.int64)[:, None] * weights_stride + column[None, :]
    tl.store(places, block.to(weights_RC.dtype.element_ty), mask=keep[:, None])


@triton.jit
def softmax_kernel(
    teacher_RT, teacher_head_WT, student_RS, student_head_WS,
    before_M,  # peaks of the tiles before this one
    first_RC, student_RC, unit_RC,  # out: weights of the rows to sum
    peak_BM, mass_BM, unit_mass_BM, cross_BR,  # out: statistics of each column block
    teacher_width, student_width, weights_stride, num_rows, first, stop, inverse_temperature, temperature, limit,
    LEAD: tl.constexpr,
    TEACHER_EVEN: tl.constexpr, STUDENT_EVEN: tl.constexpr, TEACHER_WIDEN: tl.constexpr, STUDENT_WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Exponentials of the columns [first, stop), and their sums by column block (see SoftmaxSums).

    LEAD: whose expectation `cross` is, "teacher", "student" or None. Pointers that are None are left out; all
    weights are of `student_RC`'s model but `first_RC`: those of the leading model, for the student times z_S - z_T.
    """
    row_block, block = place(tl.cdiv(num_rows, ROWS), tl.cdiv(stop - first, COLUMNS), GROUP)
    rows, offset = row_block * ROWS + tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
    keep, valid = rows < num_rows, (first + offset < stop)[None, :]
    row, column = tl.minimum(rows, num_rows - 1), tl.minimum(first + offset, stop - 1)
    student_rows = 0
    if teacher_RT is not None:
        student_rows = num_rows
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
    model_rows = student_rows + num_rows
    if teacher_RT is not None:
        peak = tl.max(tl.where(valid, teacher, float("-inf")), 1)
        centre = reference(peak, tl.load(before_M + row), limit)
        weight = tl.where(valid, tl.exp(teacher - centre[:, None]), 0.0)
        tl.store(peak_BM + block * model_rows + rows, peak, mask=keep)
        tl.store(mass_BM + block * model_rows + rows, tl.sum(weight, 1), mask=keep)
        if LEAD == "teacher":
            tl.store(cross_BR + block * num_rows + rows, tl.sum(weight * (student - teacher), 1), mask=keep)
            if first_RC is not None:
                store_block(first_RC, weight, row, offset, weights_stride, keep)
        if unit_mass_BM is not None:
            unit = tl.where(valid, tl.exp((teacher - centre[:, None]) * temperature), 0.0)
            tl.store(unit_mass_BM + block * model_rows + rows, tl.sum(unit, 1), mask=keep)
    at = block * model_rows + student_rows + rows
    peak = tl.max(tl.where(valid, student, float("-inf")), 1)
    centre = reference(peak, tl.load(before_M + student_rows + row), limit)
    weight = tl.where(valid, tl.exp(student - centre[:, None]), 0.0)
    tl.store(peak_BM + at, peak, mask=keep)
    tl.store(mass_BM + at, tl.sum(weight, 1), mask=keep)
    if student_RC is not None:
        store_block(student_RC, weight, row, offset, weights_stride, keep)
    if LEAD == "student":
        product = weight * (student - teacher)
        tl.store(cross_BR + block * num_rows + rows, tl.sum(product, 1), mask=keep)
        if first_RC is not None:
            store_block(first_RC, product, row, offset, weights_stride, keep)
    if unit_mass_BM is not None:
        unit = tl.where(valid, tl.exp((student - centre[:, None]) * temperature), 0.0)
        tl.store(unit_mass_BM + at, tl.sum(unit, 1), mask=keep)
        if unit_RC is not None:
            store_block(unit_RC, unit, row, offset, weights_stride, keep)


@triton.jit
def fold_kernel(
    peak_BR, mass_BR, unit_mass_BR, cross_BR,
    before_R, peak_R, target_R, mass_R, unit_mass_R, cross_R,
    num_rows, num_blocks, block_stride, temperature, limit,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add one model's statistics of a tile's column blocks to those of the tiles before it.

    Out: peak_R, and target_R, to which `rescale_kernel` makes all weights of a row relative.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep, blocks = row < num_rows, tl.arange(0, BLOCKS)[:, None]
    inside = (blocks < num_blocks) & keep[None, :]
    at = blocks * block_stride + row[None, :]
    block_peak = tl.load(peak_BR + at, mask=inside, other=0.0)
    before = tl.load(before_R + row, mask=keep, other=0.0)
    peak = tl.maximum(before, tl.max(tl.where(inside, block_peak, float("-inf")), 0))
    centre = reference(block_peak, before[None, :], limit)
    moved = tl.max((inside & (centre != before[None, :])).to(tl.int32), 0) > 0
    tl.store(peak_R + row, peak, mask=keep)
    tl.store(target_R + row, tl.where(moved, peak, before), mask=keep)
    shrink, gain = before - peak, tl.where(inside, centre - peak[None, :], float("-inf"))
    mass = tl.sum(tl.load(mass_BR + at, mask=inside, other=0.0) * tl.exp(gain), 0)
    mass += tl.load(mass_R + row, mask=keep, other=0.0) * tl.exp(shrink)
    tl.store(mass_R + row, mass, mask=keep)
    if unit_mass_R is not None:
        unit = tl.sum(tl.load(unit_mass_BR + at, mask=inside, other=0.0) * tl.exp(gain * temperature), 0)
        unit += tl.load(unit_mass_R + row, mask=keep, other=0.0) * tl.exp(shrink * temperature)
        tl.store(unit_mass_R + row, unit, mask=keep)
    if cross_R is not None:
        at = blocks * num_rows + row[None, :]
        cross = tl.sum(tl.load(cross_BR + at, mask=inside, other=0.0) * tl.exp(gain), 0)
        cross += tl.load(cross_R + row, mask=keep, other=0.0) * tl.exp(shrink)
        tl.store(cross_R + row, cross, mask=keep)


@triton.jit
def rescale_kernel(
    weights_RC, peak_BR, before_R, target_R,
    block_stride, weights_stride, num_rows, num_blocks, power, limit,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Make the weights of a row relative to its target, where they are not: rare, where a logit leaps up."""
    row_block, block = place(tl.cdiv(num_rows, ROWS), num_blocks, GROUP)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(rows, num_rows - 1)
    centre = reference(tl.load(peak_BR + block * block_stride + row), tl.load(before_R + row), limit)
    target = tl.load(target_R + row)
    if tl.max((centre != target).to(tl.int32), 0) > 0:
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        places = weights_RC + row.to(tl.int64)[:, None] * weights_stride + column[None, :]
        keep = (rows < num_rows)[:, None]
        weight = tl.load(places, mask=keep, other=0.0).to(tl.float32)
        weight *= tl.exp((centre - target) * power)[:, None]
        tl.store(places, weight.to(weights_RC.dtype.element_ty), mask=keep)


@triton.jit
def accumulate_kernel(
    rows_RS, weights_RC, head_CS,
    before_R, target_R, peak_R, kept_B, num_kept,
    width, weights_stride, num_rows, num_columns, max_kept, power,
    EVEN: tl.constexpr, FULL: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows = rows e^(before - peak) + (weights @ head) e^(target - peak); without peaks rows += weights @ head.

    EVEN: width is a multiple of COLUMNS; FULL: num_columns is one of DEPTH. kept_B: the column blocks of BLOCK
    that this row block is to sum, `num_kept` of them, [row blocks, max_kept] and [row blocks]; None: all.
    """
    row_block, column_block = place(tl.cdiv(num_rows, ROWS), tl.cdiv(width, COLUMNS), GROUP)
    rows, column = row_block * ROWS + tl.arange(0, ROWS), column_block * COLUMNS + tl.arange(0, COLUMNS)
    row, depth, inside = tl.minimum(rows, num_rows - 1), tl.arange(0, DEPTH), column < width
    left = weights_RC + row.to(tl.int64)[:, None] * weights_stride + depth[None, :]
    right = head_CS + depth.to(tl.int64)[:, None] * width + column[None, :]
    num_steps = tl.cdiv(num_columns, DEPTH)
    if kept_B is not None:
        num_steps = tl.load(num_kept + row_block) * (BLOCK // DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(num_steps):
        start = step * DEPTH
        if kept_B is not None:
            block = tl.load(kept_B + row_block * max_kept + start // BLOCK)
            start = tl.multiple_of(block * BLOCK + start % BLOCK, DEPTH)
        places = right + start.to(tl.int64) * width
        if not FULL:  # the weights there are 0
            last = tl.minimum(start + depth, num_columns - 1).to(tl.int64)
            places = head_CS + last[:, None] * width + column[None, :]
        head_block = tl.load(places) if EVEN else tl.load(places, mask=inside[None, :], other=0.0)
        total = multiply(tl.load(left + start), head_block, total, WIDEN)
    shrink, gain = tl.full((ROWS,), 1.0, tl.float32), tl.full((ROWS,), 1.0, tl.float32)
    if peak_R is not None:
        peak = tl.load(peak_R + row)
        shrink = tl.exp((tl.load(before_R + row) - peak) * power)
        gain = tl.exp((tl.load(target_R + row) - peak) * power)
    # Half by half, for the sake of registers.
    HALF: tl.constexpr = COLUMNS // 2
    halves = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, HALF)), (0, 2, 1)))
    for half in tl.static_range(2):
        column = column_block * COLUMNS + half * HALF + tl.arange(0, HALF)
        places = rows_RS + row.to(tl.int64)[:, None] * width + column[None, :]
        keep = (rows < num_rows)[:, None] & (column < width)[None, :]
        sums = tl.load(places, mask=keep, other=0.0) * shrink[:, None] + halves[half] * gain[:, None]
        tl.store(places, sums, mask=keep)
