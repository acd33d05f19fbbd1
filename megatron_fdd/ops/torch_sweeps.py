"""The sweeps over the vocabulary in plain torch, tile by tile: the implementation for CPUs and for float64.

Shapes: R tokens, M rows = R per model (teacher's first, student's last), C columns of a tile, D the student's
width, W rows of the head shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_fdd.ops.heads import Model
from megatron_fdd.ops.kl_gradients import Normalisers, Upstream
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.softmax_sums import SoftmaxSums
from megatron_fdd.ops.vocab_tiles import LogitTiles, Tile, accumulate, product, row_blocks, statistics_dtype

# If skipping leaves fewer than this share of the rows, a product reads only the remaining rows.
WORTH_SKIPPING = 0.9
# Rows of a head whose gradient exists at a time, if the product cannot add into the gradient directly.
HEAD_PIECE = 4096


class TorchSweeps:
    """The sweeps of one block of tokens (`ops.blocks.Sweeps`).

    A sweep has two [R, tile] buffers. With `request.held_rows` the tile is this rank's whole vocabulary, and its
    logits are kept until the last sweep, so that later sweeps need no product for logits. Where a gradient needs
    probabilities alone, they are kept in place of them.
    """

    def __init__(self, request: Request, teacher: Model | None, student: Model) -> None:
        self._request, self._models = request, (teacher, student)
        self._tiles = LogitTiles(
            teacher,
            student,
            num_valid=request.shard.num_valid,
            tile_size=request.implementation.tile_columns(student[1], request.divergence)
            if request.held_rows is None
            else request.shard.num_valid,
            temperature=request.temperature,
            extras=(request.teacher_extras, request.student_extras),
        )
        self._held: list[Tile] | None = None
        self._holds_probabilities = _holds_probabilities(request)
        self._local_lse_M: Tensor | None = None  # to which they belong

    def softmax_sums(self) -> SoftmaxSums:
        """Run the online softmax over this rank's part of the vocabulary."""
        sums = SoftmaxSums.nothing_seen(self._request, *self._models)
        for tile in self._sweep():
            if self._holds_probabilities:
                _to_probabilities(sums, tile)
            else:
                _add(self._request, sums, tile)
        self._local_lse_M = sums.peak_M + sums.mass_M.log() if self._holds_probabilities else None
        return sums

    def second_sums(self, lse_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sums of value and score, [2, R]; and the sum of score * W_S above that of p_S * W_S, [M, D]."""
        tiles, divergence = self._tiles, self._request.two_sweep
        assert divergence is not None
        count = tiles.num_tokens
        sums_2R = tiles.zeros(2, count)
        rows_MD = tiles.zeros(2 * count, tiles.student_width) if self._request.body_gradient else None
        teacher_lse_R, student_lse_R = lse_M[:count, None], lse_M[count:, None]
        for tile in self._sweep():
            assert tile.teacher_RC is not None
            for rows in row_blocks(tile.student_RC):
                student_log = tile.student_RC[rows] - student_lse_R[rows]
                teacher_log = tile.teacher_RC[rows] - teacher_lse_R[rows]
                slope = None if rows_MD is None else _slope(self._request, tile, rows)
                value, score = divergence.value_and_score(teacher_log, student_log)
                sums_2R[0, rows] += value.sum(1)
                sums_2R[1, rows] += score.sum(1)
                if rows_MD is not None:
                    tile.teacher_RC[rows] = score
                    torch.exp(student_log, out=tile.student_RC[rows])
                    if slope is not None:
                        tile.teacher_RC[rows] *= slope
                        tile.student_RC[rows] *= slope
            if rows_MD is not None:
                accumulate(rows_MD, tile.logits_MC, tile.head_CD)
        return sums_2R, rows_MD

    def gradients(
        self,
        upstream: Upstream,
        normalisers: Normalisers,
        labels_R: Tensor | None,
        head_gradient_WD: Tensor | None,
    ) -> Tensor:
        """Return this rank's part of the hidden states' gradient, [R, D]; add the head's to `head_gradient_WD`."""
        tiles, request = self._tiles, self._request
        gradient_RD = tiles.zeros(tiles.num_tokens, tiles.student_width)
        scale_M = None if self._local_lse_M is None else (self._local_lse_M - normalisers.lse_M).exp_()
        for tile in self._sweep():
            for rows in row_blocks(tile.student_RC):
                if scale_M is not None:
                    _to_gradient(request, tile, rows, upstream, scale_M)
                    continue
                slope = _slope(request, tile, rows)
                gradient = _logit_gradient(request, tile, rows, upstream, normalisers)
                tile.student_RC[rows] = gradient if slope is None else gradient.mul_(slope)
            if labels_R is not None:
                _subtract_labels(tile, labels_R - request.shard.first, upstream.label_R)
            accumulate(gradient_RD, tile.student_RC, tile.head_CD)
            if head_gradient_WD is not None:
                add_head_gradient(head_gradient_WD[tile.columns], tile.student_RC, tiles.hiddens[-1])
        self._held = self._local_lse_M = None
        return gradient_RD

    def _sweep(self) -> Iterable[Tile]:
        if self._request.held_rows is None:
            return self._tiles
        if self._held is None:
            self._held = list(self._tiles)
        return self._held


def _holds_probabilities(request: Request) -> bool:
    """Whether the gradient needs no more of the held logits than both models' probabilities, at one temperature."""
    is_linear = request.divergence is None or request.divergence.teacher_leads
    is_one = not request.needs_both_temperatures and request.student_extras.cap is None
    return request.held_rows is not None and is_linear and is_one


def _to_probabilities(sums: SoftmaxSums, tile: Tile) -> None:
    """Set the sums to those of a tile, which is all that this rank has, and turn its logits into probabilities there.

    torch's softmax takes the time of an exponential, and the largest probability is 1 / mass.
    """
    models = ((tile.teacher_RC, sums.teacher), (tile.student_RC, sums.student))
    for rows in row_blocks(tile.student_RC):
        difference = None if tile.teacher_RC is None else tile.student_RC[rows] - tile.teacher_RC[rows]
        for logits_RC, model in models[2 - sums.num_models :]:
            assert logits_RC is not None
            logits = logits_RC[rows]
            torch.amax(logits, 1, out=sums.peak_M[model][rows])
            torch.softmax(logits, 1, out=logits)
            torch.amax(logits, 1, out=sums.mass_M[model][rows]).reciprocal_()
        if difference is not None and sums.cross_R is not None:
            assert tile.teacher_RC is not None
            expected = difference.mul_(tile.teacher_RC[rows]).sum(1)
            sums.cross_R[rows] = expected.mul_(sums.mass_M[sums.teacher][rows])


def _slope(request: Request, tile: Tile, rows: slice) -> Tensor | None:
    """Return the derivative of some rows' student logits with respect to their products; None if it is 1."""
    return request.student_extras.slope(tile.student_RC[rows], request.temperature)


def add_head_gradient(rows_CD: Tensor, gradient_RC: Tensor, hidden_RD: Tensor) -> None:
    """Add gradient.T @ hidden to rows; half-precision rows in pieces, to need no second tensor of their size."""
    dtype = statistics_dtype(rows_CD)
    if rows_CD.dtype == dtype:
        accumulate(rows_CD, gradient_RC.T, hidden_RD)
        return
    for part_CD, part_RC in zip(rows_CD.split(HEAD_PIECE), gradient_RC.split(HEAD_PIECE, dim=1), strict=True):
        part_CD += product(part_RC.T, hidden_RD, dtype)


def _add(request: Request, sums: SoftmaxSums, tile: Tile) -> None:
    """Add one tile to the sums. Its weights overwrite the logits where gradients are made from them."""
    old_peak_M, tile_peak_M = sums.peak_M.clone(), torch.empty_like(sums.peak_M)
    has_weights = sums.rows_MD is not None or sums.unit_rows_RD is not None
    for rows in row_blocks(tile.student_RC):
        _add_rows(sums, tile, rows, tile_peak_M, _slope(request, tile, rows) if has_weights else None)
    if sums.rows_MD is None:
        return
    shrink_M, gap_M = old_peak_M.sub_(sums.peak_M).exp_(), tile_peak_M.sub_(sums.peak_M)
    weights_MC = tile.logits_MC
    if request.one_sweep is None:
        weights_MC, shrink_M, gap_M = tile.student_RC, shrink_M[sums.student], gap_M[sums.student]
    elif sums.student_leads:
        shrink_M, gap_M = shrink_M[sums.student].repeat(2), gap_M[sums.student].repeat(2)
    sums.rows_MD.mul_(shrink_M[:, None])
    accumulate_kept(sums.rows_MD, weights_MC, tile.head_CD, gap_M, request.implementation.skip_below)


def _add_rows(sums: SoftmaxSums, tile: Tile, rows: slice, tile_peak_M: Tensor, slope: Tensor | None) -> None:
    """Add some rows of a tile to all sums but `rows_MD`. The temporaries have the size of these rows.

    Args:
        slope: multiplies the weights of the head's rows; None: 1.
    """
    in_place = sums.rows_MD is not None
    difference = None
    if sums.cross_R is not None:
        assert tile.teacher_RC is not None
        difference = tile.student_RC[rows] - tile.teacher_RC[rows]
    models = ((tile.teacher_RC, sums.teacher), (tile.student_RC, sums.student))
    for logits_RC, model in models[2 - sums.num_models :]:
        assert logits_RC is not None
        logits, running_peak = logits_RC[rows], sums.peak_M[model][rows]
        tile_peak = torch.amax(logits, 1, out=tile_peak_M[model][rows])
        peak = torch.maximum(running_peak, tile_peak)
        shrink = (running_peak - peak).exp_()
        running_peak.copy_(peak)
        weights = torch.sub(logits, peak[:, None], out=logits if in_place else None)
        if sums.unit_mass_M is not None:
            unit = (weights * sums.temperature).exp_()
            unit_shrink = shrink**sums.temperature
            sums.unit_mass_M[model][rows].mul_(unit_shrink).add_(unit.sum(1))
            if sums.unit_rows_RD is not None and model == sums.student:
                unit = unit if slope is None else unit.mul_(slope)
                sums.unit_rows_RD[rows].mul_(unit_shrink[:, None])
                accumulate(sums.unit_rows_RD[rows], unit, tile.head_CD)
        weights.exp_()
        sums.mass_M[model][rows].mul_(shrink).add_(weights.sum(1))
        if difference is not None and sums.cross_R is not None and model == sums.lead:
            sums.cross_R[rows].mul_(shrink).add_(difference.mul_(weights).sum(1))
        if in_place and slope is not None:
            weights.mul_(slope)
    if in_place and sums.student_leads:
        assert tile.teacher_RC is not None
        assert difference is not None
        # The teacher's exponentials are summed already; the weights of rkl's gradient overwrite them.
        tile.teacher_RC[rows] = difference if slope is None else difference.mul_(slope)


def accumulate_kept(
    rows_MD: Tensor, weights_MC: Tensor, head_CD: Tensor, gap_M: Tensor, skip_below: float
) -> None:
    """Add weights @ head to rows, except rows whose weights in this tile are all at most exp(gap) < `skip_below`.

    exp(gap) bounds the probabilities too: the log-sum-exp is at least the running maximum.
    """
    if skip_below > 0:
        kept = kept_rows(gap_M, skip_below)
        if len(kept) < WORTH_SKIPPING * len(gap_M):
            rows_MD.index_add_(0, kept, product(weights_MC[kept], head_CD, rows_MD.dtype))
            return
    accumulate(rows_MD, weights_MC, head_CD)


def kept_rows(gap_M: Tensor, skip_below: float) -> Tensor:
    """Return the indices of the rows that are not skipped. Synchronises on a GPU."""
    return (gap_M >= math.log(skip_below)).nonzero()[:, 0]


def _logit_gradient(
    request: Request, tile: Tile, rows: slice, upstream: Upstream, normalisers: Normalisers
) -> Tensor:
    """Return the gradient of some rows' student logits without the labels' part. Temporaries have that size."""
    student = tile.student_RC[rows]
    unit = upstream.unit_R[rows, None]
    if request.divergence is None:
        return (student - normalisers.unit_lse_R[rows, None]).exp_().mul_(unit)
    assert tile.teacher_RC is not None
    assert normalisers.centre_R is not None
    teacher_lse, student_lse = normalisers.lse_M.view(2, -1)[:, rows, None]
    student_log = student - student_lse
    score = request.divergence.score(tile.teacher_RC[rows] - teacher_lse, student_log)
    # score * up + p * (unit - centre * up), in as few passes as possible.
    probability = student_log.exp_()
    scale = upstream.divergence_R[rows, None]
    own = -normalisers.centre_R[rows, None] * scale
    if request.needs_temperature_one and not request.needs_both_temperatures:
        own = own + unit
    gradient = score.mul_(scale).addcmul_(probability, own)
    if request.needs_both_temperatures:
        unit_log = student.mul(request.temperature).sub_(normalisers.unit_lse_R[rows, None])
        gradient.addcmul_(unit_log.exp_(), unit)
    return gradient


def _to_gradient(request: Request, tile: Tile, rows: slice, upstream: Upstream, scale_M: Tensor) -> None:
    """Turn the student's held probabilities of some rows into what `_logit_gradient` returns, in place.

    Args:
        scale_M: makes probabilities of the whole vocabulary of those of this rank's part.
    """
    up_R = upstream.divergence_R[rows]
    own_R = upstream.unit_R[rows] if request.needs_temperature_one else torch.zeros_like(up_R)
    gradient = tile.student_RC[rows]
    if tile.teacher_RC is None:
        gradient.mul_((own_R * scale_M[rows])[:, None])
        return
    teacher_R, student_R = (scale[rows] for scale in scale_M.view(2, -1))
    gradient.mul_(((own_R + up_R) * student_R)[:, None])
    gradient.addcmul_(tile.teacher_RC[rows], (up_R * teacher_R)[:, None], value=-1)


def _subtract_labels(tile: Tile, local_R: Tensor, amount_R: Tensor) -> None:
    """Subtract amount_i from student_RC[i, label of i], for labels within the tile."""
    column_R = local_R - tile.columns.start
    inside_R = (column_R >= 0) & (local_R < tile.columns.stop)
    column_R = column_R.masked_fill(~inside_R, 0)
    amount_R = amount_R.masked_fill(~inside_R, 0.0)
    tile.student_RC.scatter_add_(1, column_R[:, None], -amount_R[:, None])
