"""Launches of the Triton kernels: which blocks, which grid, which arguments. Tensors in, tensors filled.

Shapes: see gpu/kernels.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.gpu import kernels as kernels
from megatron_fdd.ops.gpu import scores as scores
from megatron_fdd.ops.gpu.blocks import Blocks, Cut, Launch, must_widen
from megatron_fdd.ops.plan import Model


@dataclass(frozen=True, slots=True)
class Pair:
    """Both models' hidden states and heads, and some columns of the vocabulary."""

    teacher: Model | None
    student: Model
    columns: slice
    temperature: float

    @property
    def num_rows(self) -> int:
        """Tokens."""
        return len(self.student[0])

    def num_blocks(self, blocks: Blocks) -> int:
        """Column blocks of a tile."""
        return triton.cdiv(self.columns.stop - self.columns.start, blocks.columns)

    def launch(self, kernel: Any, blocks: Blocks, arguments: dict[str, Any]) -> Launch:
        """A kernel that computes the logits of these columns."""
        hidden, head = self.teacher or (None, None)
        arguments |= {
            "teacher_RT": hidden,
            "teacher_head_WT": head,
            "teacher_width": 1 if hidden is None else hidden.shape[1],
            "TEACHER_EVEN": hidden is None or hidden.shape[1] % blocks.depth == 0,
            "TEACHER_WIDEN": head is not None and must_widen(head),
            "student_RS": self.student[0],
            "student_head_WS": self.student[1],
            "student_width": self.student[0].shape[1],
            "STUDENT_EVEN": self.student[0].shape[1] % blocks.depth == 0,
            "STUDENT_WIDEN": must_widen(self.student[1]),
            "num_rows": self.num_rows,
            "first": self.columns.start,
            "stop": self.columns.stop,
            "inverse_temperature": 1 / self.temperature,
        }
        programs = triton.cdiv(self.num_rows, blocks.rows) * self.num_blocks(blocks)
        return Launch(kernel, programs, arguments | blocks.sizes, blocks.warps, blocks.stages)


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Of each column block of a tile, relative to the block's reference (see SoftmaxSums)."""

    peak_BM: Tensor
    mass_BM: Tensor
    unit_mass_BM: Tensor | None
    cross_BR: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """Exponentials of a tile; None: not wanted. For their meaning see SoftmaxSums."""

    first_RC: Tensor | None
    student_RC: Tensor | None
    unit_RC: Tensor | None

    @property
    def stride(self) -> int:
        """Of their rows."""
        given = [each for each in (self.first_RC, self.student_RC, self.unit_RC) if each is not None]
        return given[0].stride(0) if given else 0


def leap_limit(dtype: torch.dtype, temperature: float) -> float:
    """How far a logit may exceed all of the tiles before: weights (heated, or times a gap of logits) stay finite."""
    return (4.0 if dtype == torch.float16 else 30.0) / max(1.0, temperature)


def softmax(
    pair: Pair,
    before_M: Tensor,
    weights: Weights,
    statistics: BlockStatistics,
    lead: str | None,
    blocks: Blocks,
) -> Launch:
    """Weights and statistics of a tile. `lead`: under which model `cross_BR` is an expectation."""
    arguments = {
        "before_M": before_M,
        "first_RC": weights.first_RC,
        "student_RC": weights.student_RC,
        "unit_RC": weights.unit_RC,
        "weights_stride": weights.stride,
        "peak_BM": statistics.peak_BM,
        "mass_BM": statistics.mass_BM,
        "unit_mass_BM": statistics.unit_mass_BM,
        "cross_BR": statistics.cross_BR,
        "temperature": pair.temperature,
        "limit": leap_limit(pair.student[1].dtype, pair.temperature),
        "LEAD": lead,
    }
    return pair.launch(kernels.softmax_kernel, blocks, arguments)


def mixture(
    pair: Pair,
    lse_M: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    statistics: tuple[Tensor, Tensor, Tensor | None],
    divergence: Divergence,
    blocks: Blocks,
) -> Launch:
    """Score and probabilities of a tile, and by column block [B, R] value and score, [B, M] the largest weights."""
    value_BR, score_BR, largest_BM = statistics
    arguments = {
        "lse_M": lse_M,
        "score_RC": None if weights is None else weights[0],
        "student_RC": None if weights is None else weights[1],
        "weights_stride": 0 if weights is None else weights[0].stride(0),
        "value_BR": value_BR,
        "score_BR": score_BR,
        "largest_BM": largest_BM,
    }
    return pair.launch(scores.mixture_kernel, blocks, arguments | _kind(divergence))


@dataclass(frozen=True, slots=True)
class LogitFactors:
    """What the gradient of the logits is made of, [R]; None: left out."""

    lse_M: Tensor | None  # of both models, over the temperature
    unit_lse_R: Tensor  # the student's, at temperature 1
    scale_R: Tensor | None  # of the divergence's score
    own_R: Tensor | None  # of the student's probability
    unit_R: Tensor | None  # of its probability at temperature 1
    label_R: Tensor | None  # rows of the head; others than the valid ones: none
    label_scale_R: Tensor | None  # subtracted there


def gradient(
    pair: Pair, factors: LogitFactors, gradient_RC: Tensor, divergence: Divergence | None, blocks: Blocks
) -> Launch:
    """Gradient of the student's logits (not over the temperature) of a tile."""
    arguments = {name: getattr(factors, name) for name in LogitFactors.__dataclass_fields__}
    arguments |= {
        "gradient_RC": gradient_RC,
        "weights_stride": gradient_RC.stride(0),
        "temperature": pair.temperature,
    }
    return pair.launch(scores.gradient_kernel, blocks, arguments | _kind(divergence))


@dataclass(frozen=True, slots=True)
class Totals:
    """Statistics of the tiles so far: in place, but the peaks before and after a tile, and what it is relative to."""

    before_M: Tensor
    peak_M: Tensor
    target_M: Tensor
    mass_M: Tensor
    unit_mass_M: Tensor | None
    cross_R: Tensor | None


def fold(
    statistics: BlockStatistics, totals: Totals, pair: Pair, cut: Cut, *, model: slice, leads: bool
) -> Launch:
    """Add the statistics of a tile's blocks, of one model's rows, to the totals. `leads`: `cross_R` is of it."""
    most_blocks = triton.next_power_of_2(len(statistics.peak_BM))
    rows = max(1, 2048 // most_blocks)

    def own(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[..., model]

    arguments = {
        "peak_BR": own(statistics.peak_BM),
        "mass_BR": own(statistics.mass_BM),
        "unit_mass_BR": own(statistics.unit_mass_BM),
        "cross_BR": statistics.cross_BR if leads else None,
        "before_R": own(totals.before_M),
        "peak_R": own(totals.peak_M),
        "target_R": own(totals.target_M),
        "mass_R": own(totals.mass_M),
        "unit_mass_R": own(totals.unit_mass_M),
        "cross_R": totals.cross_R if leads else None,
        "num_rows": pair.num_rows,
        "num_blocks": pair.num_blocks(cut.logits),
        "block_stride": statistics.peak_BM.stride(0),
        "temperature": pair.temperature,
        "limit": leap_limit(pair.student[1].dtype, pair.temperature),
        "BLOCKS": most_blocks,
        "ROWS": rows,
    }
    return Launch(kernels.fold_kernel, triton.cdiv(pair.num_rows, rows), arguments)


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the weights of one model are relative to, [R] each."""

    before_R: Tensor  # before the tile
    target_R: Tensor  # the tile's weights, once they are made alike
    peak_R: Tensor  # after the tile: what sums of rows are relative to
    power: float  # the weights are exponentials of this many times the logits


def rescale(weights_RC: Tensor, block_peak_BR: Tensor, peaks: Peaks, limit: float, blocks: Blocks) -> Launch:
    """Make a tile's weights relative to `target_R`. `block_peak_BR`: of the tile's column blocks."""
    num_rows, num_blocks = len(weights_RC), len(block_peak_BR)
    arguments = {
        "weights_RC": weights_RC,
        "peak_BR": block_peak_BR,
        "before_R": peaks.before_R,
        "target_R": peaks.target_R,
        "block_stride": block_peak_BR.stride(0),
        "weights_stride": weights_RC.stride(0),
        "num_rows": num_rows,
        "num_blocks": num_blocks,
        "power": peaks.power,
        "limit": limit,
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "GROUP": blocks.group,
    }
    return Launch(kernels.rescale_kernel, triton.cdiv(num_rows, blocks.rows) * num_blocks, arguments)


def kept_blocks(largest_BR: Tensor, skip_below: float, cut: Cut) -> tuple[Tensor, Tensor]:
    """Which column blocks each row block has to sum, in order, and how many: [row blocks, B] and [row blocks]."""
    num_blocks, num_rows = largest_BR.shape
    padding = -num_rows % cut.sums.rows
    padded = torch.nn.functional.pad(largest_BR, (0, padding), value=0.0)
    kept = (padded.view(num_blocks, -1, cut.sums.rows).amax(2) >= skip_below).T
    order = kept.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    return order.to(torch.int32).contiguous(), kept.sum(1, dtype=torch.int32)


def accumulate(
    rows_RS: Tensor,
    weights_RC: Tensor,
    head_CS: Tensor,
    cut: Cut,
    *,
    peaks: Peaks | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Launch:
    """rows += weights @ head, both relative to the new peak. `kept`: of `kept_blocks`; None: all column blocks."""
    blocks, width = cut.sums, rows_RS.shape[1]
    arguments = {
        "rows_RS": rows_RS,
        "weights_RC": weights_RC,
        "head_CS": head_CS,
        "before_R": None if peaks is None else peaks.before_R,
        "target_R": None if peaks is None else peaks.target_R,
        "peak_R": None if peaks is None else peaks.peak_R,
        "power": 1.0 if peaks is None else peaks.power,
        "kept_B": None if kept is None else kept[0],
        "num_kept": None if kept is None else kept[1],
        "max_kept": 1 if kept is None else kept[0].shape[1],
        "width": width,
        "weights_stride": weights_RC.stride(0),
        "num_rows": len(rows_RS),
        "num_columns": len(head_CS),
        "EVEN": width % blocks.columns == 0,
        "FULL": len(head_CS) % blocks.depth == 0,
        "WIDEN": must_widen(head_CS),
        "BLOCK": cut.logits.columns,
    }
    programs = triton.cdiv(len(rows_RS), blocks.rows) * triton.cdiv(width, blocks.columns)
    # The list of kept blocks is itself loaded ahead, by two of the stages.
    stages = blocks.stages if kept is None else blocks.stages + 2
    return Launch(kernels.accumulate_kernel, programs, arguments | blocks.sizes, blocks.warps, stages)


def _kind(divergence: Divergence | None) -> dict[str, Any]:
    if divergence is None:
        return {"KIND": None, "mix": 0.5, "log_mix": 0.0, "log_rest": 0.0}
    mix = divergence.mixture
    return {"KIND": divergence.kind, "mix": mix, "log_mix": math.log(mix), "log_rest": math.log1p(-mix)}
