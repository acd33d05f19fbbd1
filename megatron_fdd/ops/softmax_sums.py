"""What forward sweeps sum up, and how the ranks' sums become statistics of the whole vocabulary.

Shapes: R tokens, M rows = R per model (teacher's first, student's last), C columns of a tile, S the student's
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.plan import Plan
from megatron_fdd.ops.vocab_shard import VocabShard
from megatron_fdd.ops.vocab_tiles import LogitTiles, Tile, accumulate, row_blocks


class SoftmaxSums:
    """Sums over the vocabulary tiles seen so far, relative to a running maximum (online softmax).

    With e = exp(logits - peak), z the logits over the temperature:
    peak_M, mass_M = sum e; unit_mass_M = sum e^temperature;
    cross_R = sum e_lead (z_S - z_T), lead = T for fkl, S for rkl;
    rows_MS: sum e_T W_S, then sum e_S W_S (for rkl, sum e_S (z_S - z_T) W_S comes first);
    without a divergence it is sum e_S W_S alone; unit_rows_RS = sum e_S^temperature W_S.
    """

    def __init__(self, tiles: LogitTiles, plan: Plan) -> None:
        count, width = tiles.num_tokens, tiles.student_width
        self.num_models = len(tiles.models)
        total = count * self.num_models
        self.crossing, self.temperature = plan.crossing, plan.temperature
        self.teacher, self.student = slice(0, count), slice(total - count, total)
        self.lead = self.student if self.crossing and self.crossing.student_leads else self.teacher
        self.peak_M = tiles.zeros(total).fill_(-torch.inf)
        self.mass_M = tiles.zeros(total)
        self.unit_mass_M = tiles.zeros(total) if plan.heated else None
        self.cross_R = tiles.zeros(count) if self.crossing else None
        self.rows_MS = self.unit_rows_RS = None
        if plan.body_gradient and not plan.mixture:
            self.rows_MS = tiles.zeros(total if self.crossing else count, width)
        if plan.body_gradient and plan.heated:
            self.unit_rows_RS = tiles.zeros(count, width)
        for tile in tiles:
            self._add(tile)

    def _add(self, tile: Tile) -> None:
        peak_M = torch.maximum(self.peak_M, tile.logits_MC.amax(1))
        shrink_M = (self.peak_M - peak_M).exp_()
        self.peak_M = peak_M
        if self.unit_mass_M is not None:
            self._add_unit(tile, shrink_M**self.temperature)
        if tile.teacher_RC is not None and self.cross_R is not None:
            torch.sub(tile.student_RC, tile.teacher_RC, out=tile.scratch_RC)
        weights_MC = tile.logits_MC.sub_(peak_M[:, None]).exp_()
        self.mass_M.mul_(shrink_M).add_(weights_MC.sum(1))
        if self.cross_R is not None:
            self._add_cross(tile, shrink_M[self.lead])
        if self.rows_MS is None:
            return
        if self.crossing is None:
            weights_MC, shrink_M = tile.student_RC, shrink_M[self.student]
        elif self.crossing.student_leads:
            shrink_M = shrink_M[self.student].repeat(2)
        self.rows_MS.mul_(shrink_M[:, None])
        accumulate(self.rows_MS, weights_MC, tile.head_CS)

    def _add_cross(self, tile: Tile, shrink_R: Tensor) -> None:
        assert self.cross_R is not None
        assert tile.teacher_RC is not None
        if self.lead == self.student:
            # The teacher's exponentials are summed: their place takes the weights of rkl's gradient.
            products_RC = torch.mul(tile.scratch_RC, tile.student_RC, out=tile.teacher_RC)
        else:
            products_RC = tile.scratch_RC.mul_(tile.teacher_RC)
        self.cross_R.mul_(shrink_R).add_(products_RC.sum(1))

    def _add_unit(self, tile: Tile, shrink_M: Tensor) -> None:
        assert self.unit_mass_M is not None
        self.unit_mass_M.mul_(shrink_M)
        for logits_RC, rows in ((tile.teacher_RC, self.teacher), (tile.student_RC, self.student)):
            assert logits_RC is not None
            torch.sub(logits_RC, self.peak_M[rows, None], out=tile.scratch_RC)
            weights_RC = tile.scratch_RC.mul_(self.temperature).exp_()
            self.unit_mass_M[rows] += weights_RC.sum(1)
        if self.unit_rows_RS is not None:  # the weights are now the student's
            self.unit_rows_RS.mul_(shrink_M[self.student, None])
            accumulate(self.unit_rows_RS, weights_RC, tile.head_CS)


@dataclass(frozen=True, slots=True)
class VocabStatistics:
    """Statistics over the whole vocabulary."""

    num_models: int
    lse_M: Tensor  # of the logits over the temperature
    scale_M: Tensor  # turns this rank's sums of exponentials into sums of probabilities
    unit_lse_M: Tensor  # at temperature 1
    unit_scale_M: Tensor
    kl_R: Tensor | None  # of a one-sweep divergence, without T^2
    cross_R: Tensor | None  # expectation of z_S - z_T under the leading model
    label_logit_R: Tensor | None


def merge(sums: SoftmaxSums, label_logit_R: Tensor | None, shard: VocabShard) -> VocabStatistics:
    """Combine the ranks' sums. Collectives: one all-gather of everything, packed."""
    optional = [sums.unit_mass_M, sums.cross_R, label_logit_R]
    pieces = [sums.peak_M, sums.mass_M, *(piece for piece in optional if piece is not None)]
    packed = shard.stack(torch.cat(pieces)).split([len(piece) for piece in pieces], dim=1)
    peaks, masses, *rest = packed
    unit_masses, crosses, label_logits = (None if piece is None else rest.pop(0) for piece in optional)

    peak_M = peaks.amax(0)
    shrinks = (peaks - peak_M).exp_()
    mass_M = (masses * shrinks).sum(0)
    log_mass_M = mass_M.log()
    lse_M, scale_M = peak_M + log_mass_M, shrinks[shard.rank] / mass_M
    unit_lse_M, unit_scale_M = lse_M, scale_M
    if unit_masses is not None:
        unit_shrinks = shrinks**sums.temperature
        unit_mass_M = (unit_masses * unit_shrinks).sum(0)
        unit_lse_M = peak_M * sums.temperature + unit_mass_M.log()
        unit_scale_M = unit_shrinks[shard.rank] / unit_mass_M
    cross_R = kl_R = None
    if crosses is not None:
        cross_R = (crosses * shrinks[:, sums.lead]).sum(0) / mass_M[sums.lead]
        # Not through the two lse: differences of like terms round like the divergence, not like the logits.
        peak_gap_R = peak_M[sums.student] - peak_M[sums.teacher]
        kl_R = peak_gap_R - cross_R + (log_mass_M[sums.student] - log_mass_M[sums.teacher])
        kl_R = -kl_R if sums.lead == sums.student else kl_R
    label_logit_R = None if label_logits is None else label_logits.sum(0)
    return VocabStatistics(
        sums.num_models, lse_M, scale_M, unit_lse_M, unit_scale_M, kl_R, cross_R, label_logit_R
    )


class MixtureSums(NamedTuple):
    """What the second sweep gives: over the whole vocabulary, but `rows` this rank's part."""

    value_R: Tensor  # the divergence, without T^2
    centre_R: Tensor  # of its score, see Divergence.summands
    rows_MS: Tensor | None  # sum of score * W_S, then sum of p_S * W_S


def mixture_sums(
    tiles: LogitTiles, divergence: Divergence, lse_M: Tensor, shard: VocabShard, *, gradient: bool
) -> MixtureSums:
    """The second sweep, of divergences that need both normalisers first. Collectives: one all-reduce [2, R]."""
    count = tiles.num_tokens
    sums_2R = tiles.zeros(2, count)
    rows_MS = tiles.zeros(2 * count, tiles.student_width) if gradient else None
    for tile in tiles:
        assert tile.teacher_RC is not None
        tile.logits_MC.sub_(lse_M[:, None])
        for rows in row_blocks(count):
            value, score = divergence.summands(tile.teacher_RC[rows], tile.student_RC[rows])
            sums_2R[0, rows] += value.sum(1)
            sums_2R[1, rows] += score.sum(1)
            tile.teacher_RC[rows] = score
        if rows_MS is not None:
            tile.student_RC.exp_()
            accumulate(rows_MS, tile.logits_MC, tile.head_CS)
    value_R, centre_R = shard.all_reduce(sums_2R)
    return MixtureSums(value_R, centre_R, rows_MS)
