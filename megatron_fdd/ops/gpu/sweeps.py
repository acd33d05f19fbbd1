"""The sweeps over the vocabulary on a GPU: cuBLAS does the matrix products, one Triton kernel a tile the rest.

Besides sums and statistics there are two [R, tile] buffers of logits, which the weights of the next products overwrite
(at a temperature other than 1, there is one more buffer, of weights). Everything is deterministic.

Shapes: see gpu/kernels.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.gpu import kernels, row_kernels
from megatron_fdd.ops.gpu.kept_tiles import add_kept_product, kept_tiles
from megatron_fdd.ops.heads import Model
from megatron_fdd.ops.kl_gradients import Normalisers, Upstream
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.softmax_sums import SoftmaxSums
from megatron_fdd.ops.torch_sweeps import accumulate_kept, add_head_gradient
from megatron_fdd.ops.vocab_tiles import LogitTiles, Tile, accumulate, empty_rows

# Columns of a streamed tile, which a program holds in registers, at most; columns that a program reads at a time of a
# row of any length; and its warps.
MOST_COLUMNS = 4096
ROW_COLUMNS = 2048
WARPS = 8


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with everything it needs to run, or to be compiled ahead of time (benchmarks/kernel_report.py)."""

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    warps: int = 4

    def run(self) -> None:
        """Enqueue the kernel on the current stream."""
        self.kernel[(self.num_programs,)](**self.arguments, num_warps=self.warps)


class TritonSweeps:
    """The sweeps of one block (see `blocks.Sweeps`). Without tokens nothing is launched."""

    def __init__(self, request: Request, teacher: Model | None, student: Model) -> None:
        self._request, self._models = request, (teacher, student)
        held = request.held_rows is not None
        tile_size = min(request.implementation.tile_columns(student[1], request.divergence), MOST_COLUMNS)
        self._tiles = LogitTiles(
            teacher,
            student,
            num_valid=request.shard.num_valid,
            tile_size=request.shard.num_valid if held else tile_size,
            temperature=1.0,
        )
        self._held: list[Tile] | None = None
        self._peaks_KM: Tensor | None = None  # of held logits, where tiles are skipped

    def softmax_sums(self) -> SoftmaxSums:
        """Run the online softmax over this rank's part of the vocabulary."""
        request, sums = self._request, SoftmaxSums.nothing_seen(self._request, *self._models)
        if sums.rows_MD is None and sums.unit_rows_RD is None:
            if request.skips_tiles:
                num_tiles = triton.cdiv(request.shard.num_valid, ROW_COLUMNS)
                self._peaks_KM = self._tiles.zeros(num_tiles, len(sums.peak_M))
            arguments = _statistics(sums) | {"peaks_KM": self._peaks_KM}
            for tile in self._sweep():
                self._launch(row_kernels.statistics_kernel, tile, arguments, ROW_COLUMNS)
        else:
            self._add_tiles(sums)
        return sums

    def _add_tiles(self, sums: SoftmaxSums) -> None:
        """Add all tiles to sums that have rows."""
        request = self._request
        reference_M = sums.peak_M.clone()
        gap_M = torch.empty_like(sums.peak_M) if request.implementation.skip_below > 0 else None
        for tile in self._sweep():
            weights = _Weights(sums, tile, request)
            arguments = _statistics(sums) | {
                "first_RC": weights.first_RC,
                "weights_RC": weights.student_RC,
                "unit_RC": weights.unit_RC,
                "out_stride": weights.stride,
                "unit_stride": 0 if weights.unit_RC is None else weights.unit_RC.stride(0),
                "reference_M": reference_M,
                "rows_MD": sums.rows_MD,
                "unit_rows_RD": sums.unit_rows_RD,
                "width": self._tiles.student_width,
                "SUM_COLUMNS": min(2048, triton.next_power_of_2(self._tiles.student_width)),
                "gap_M": gap_M,
                "limit": _leap_limit(self._models[1][1].dtype, request.temperature),
            }
            num_columns = triton.next_power_of_2(tile.columns.stop - tile.columns.start)
            self._launch(kernels.softmax_kernel, tile, arguments, num_columns)
            self._add_rows(sums, weights, gap_M)
        if request.shard.num_valid > 0:
            _scale(sums, reference_M.sub_(sums.peak_M).exp_())

    def second_sums(self, lse_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sums of value and score, [2, R]; and the sum of score * W_S above that of p_S * W_S, [M, D]."""
        request, tiles = self._request, self._tiles
        assert request.two_sweep is not None
        sums_2R = tiles.zeros(2, tiles.num_tokens)
        rows_MD = tiles.zeros(2 * tiles.num_tokens, tiles.student_width) if request.body_gradient else None
        for tile in self._sweep():
            weights_MC = _in_place(tile.logits_MC, tile.head_CD.dtype) if rows_MD is not None else None
            arguments = {
                "lse_M": lse_M,
                "score_RC": None if weights_MC is None else weights_MC[: tiles.num_tokens],
                "weights_RC": None if weights_MC is None else weights_MC[tiles.num_tokens :],
                "value_R": sums_2R[0],
                "score_R": sums_2R[1],
                "out_stride": 0 if weights_MC is None else weights_MC.stride(0),
            }
            arguments |= _value_and_score(request.two_sweep)
            self._launch(row_kernels.second_kernel, tile, arguments, ROW_COLUMNS)
            if rows_MD is not None and weights_MC is not None:
                accumulate(rows_MD, weights_MC, tile.head_CD)
        return sums_2R, rows_MD

    def gradients(
        self,
        upstream: Upstream,
        normalisers: Normalisers,
        labels_R: Tensor | None,
        head_gradient_WD: Tensor | None,
    ) -> Tensor:
        """Return this rank's part of the hidden states' gradient, [R, D]; add the head's to `head_gradient_WD`."""
        request, tiles = self._request, self._tiles
        gradient_RD = tiles.zeros(tiles.num_tokens, tiles.student_width)
        arguments = _factors(request, upstream, normalisers, labels_R) | _value_and_score(request.divergence)
        for tile in self._sweep():
            gradient_RC = _in_place(tile.student_RC, tile.head_CD.dtype)
            own = {
                "gradient_RC": gradient_RC,
                "out_stride": gradient_RC.stride(0),
                "first": tile.columns.start,
            }
            self._launch(row_kernels.gradient_kernel, tile, arguments | own, ROW_COLUMNS)
            if self._peaks_KM is None:
                accumulate(gradient_RD, gradient_RC, tile.head_CD)
            else:
                kept_KR = kept_tiles(request, self._peaks_KM, normalisers)
                add_kept_product(gradient_RD, gradient_RC, tile.head_CD, kept_KR, ROW_COLUMNS)
            if head_gradient_WD is not None:
                add_head_gradient(head_gradient_WD[tile.columns], gradient_RC, tiles.hiddens[-1])
        self._held = None
        return gradient_RD

    def _sweep(self) -> Iterable[Tile]:
        if self._tiles.num_tokens == 0:
            return ()
        if self._request.held_rows is None:
            return self._tiles
        if self._held is None:
            self._held = list(self._tiles)
        return self._held

    def _launch(self, kernel: Any, tile: Tile, arguments: dict[str, Any], columns: int) -> None:
        """Launch a kernel for a tile; a program has so many columns in registers at a time."""
        teacher, student = self._request.teacher_extras, self._request.student_extras
        arguments = arguments | {
            "teacher_RC": tile.teacher_RC,
            "student_RC": tile.student_RC,
            "teacher_bias_C": None if teacher.bias_W is None else teacher.bias_W[tile.columns],
            "teacher_cap": teacher.cap,
            "student_bias_C": None if student.bias_W is None else student.bias_W[tile.columns],
            "student_cap": student.cap,
            "stride": tile.student_RC.stride(0),
            "num_rows": self._tiles.num_tokens,
            "num_columns": tile.columns.stop - tile.columns.start,
            "inverse_temperature": 1 / self._request.temperature,
            "COLUMNS": columns,
        }
        Launch(kernel, self._tiles.num_tokens, arguments, WARPS).run()

    def _add_rows(self, sums: SoftmaxSums, weights: _Weights, gap_M: Tensor | None) -> None:
        """Add a tile's share to every sum of rows."""
        if sums.unit_rows_RD is not None and weights.unit_RC is not None:
            accumulate(sums.unit_rows_RD, weights.unit_RC, weights.head_CD)
        if sums.rows_MD is None or weights.weights_MC is None:
            return
        if gap_M is None:
            accumulate(sums.rows_MD, weights.weights_MC, weights.head_CD)
            return
        own = sums.student if sums.cross_R is None else slice(None)
        if sums.student_leads:
            gap_M = gap_M[sums.student].repeat(2)
        accumulate_kept(
            sums.rows_MD,
            weights.weights_MC,
            weights.head_CD,
            gap_M[own],
            self._request.implementation.skip_below,
        )


def _leap_limit(dtype: torch.dtype, temperature: float) -> float:
    """Return how far a logit may exceed its row's reference, so that weights stay finite (heated, or times a gap)."""
    return (4.0 if dtype == torch.float16 else 30.0) / max(1.0, temperature)


class _Weights:
    """The buffers for a tile's weights, which overwrite its logits."""

    def __init__(self, sums: SoftmaxSums, tile: Tile, request: Request) -> None:
        self.head_CD = tile.head_CD
        self.weights_MC = self.first_RC = self.student_RC = self.unit_RC = None
        self.stride = 0
        if sums.unit_rows_RD is not None:
            num_rows, num_columns = tile.student_RC.shape
            self.unit_RC = empty_rows(num_rows, num_columns, tile.head_CD.dtype, tile.head_CD.device)
        if sums.rows_MD is None:
            return
        logits = tile.student_RC if request.one_sweep is None else tile.logits_MC
        self.weights_MC = _in_place(logits, tile.head_CD.dtype)
        self.stride = self.weights_MC.stride(0)
        count = len(tile.student_RC)
        self.student_RC = self.weights_MC[-count:]
        if sums.cross_R is not None:
            self.first_RC = self.weights_MC[:count]


def _in_place(logits_RC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a view of the beginning of each row as numbers of a dtype that is at most as wide."""
    return logits_RC.view(dtype)[:, : logits_RC.shape[1]]


def _statistics(sums: SoftmaxSums) -> dict[str, Any]:
    """Return the arguments of a kernel that adds to these statistics."""
    lead = None if sums.cross_R is None else "student" if sums.student_leads else "teacher"
    return {
        "peak_M": sums.peak_M,
        "mass_M": sums.mass_M,
        "unit_mass_M": sums.unit_mass_M,
        "cross_R": sums.cross_R,
        "temperature": sums.temperature,
        "LEAD": lead,
    }


def _scale(sums: SoftmaxSums, factor_M: Tensor) -> None:
    """Make the rows relative to the peaks, like the other sums."""
    if sums.unit_rows_RD is not None:
        sums.unit_rows_RD.mul_((factor_M[sums.student] ** sums.temperature)[:, None])
    if sums.rows_MD is None:
        return
    if sums.student_leads:
        factor_M = factor_M[sums.student].repeat(2)
    elif sums.cross_R is None:
        factor_M = factor_M[sums.student]
    sums.rows_MD.mul_(factor_M[:, None])


def _factors(
    request: Request, upstream: Upstream, normalisers: Normalisers, labels_R: Tensor | None
) -> dict[str, Tensor | None]:
    """Return the factors of each row in score * up + p * (unit - centre * up) - label; None: left out."""
    scale_R = own_R = None
    if request.divergence is not None:
        assert normalisers.centre_R is not None
        scale_R = upstream.divergence_R.contiguous()
        own_R = -normalisers.centre_R * scale_R
        if request.needs_temperature_one and not request.needs_both_temperatures:
            own_R = own_R + upstream.unit_R
    return {
        "lse_M": None if request.divergence is None else normalisers.lse_M,
        "unit_lse_R": normalisers.unit_lse_R,
        "scale_R": scale_R,
        "own_R": own_R,
        "unit_R": upstream.unit_R.contiguous()
        if request.divergence is None or request.needs_both_temperatures
        else None,
        "label_R": None if labels_R is None else labels_R - request.shard.first,
        "label_scale_R": None if labels_R is None else upstream.label_R.contiguous(),
    }


def _value_and_score(divergence: Divergence | None) -> dict[str, Any]:
    """Return a kernel's arguments: the function, and its inputs besides log-probabilities."""
    if divergence is None:
        return {"VALUE_AND_SCORE": None, "mix": 0.5, "log_mix": 0.0, "log_rest": 0.0}
    mix = divergence.mix_weight
    function = divergence.definition.triton_function()
    return {
        "VALUE_AND_SCORE": function, "mix": mix, "log_mix": math.log(mix), "log_rest": math.log1p(-mix),
    }  # fmt: skip
