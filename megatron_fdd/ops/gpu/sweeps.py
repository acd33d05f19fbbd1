"""The sweeps over the vocabulary in Triton kernels: the path of GPUs. Logits never reach memory.

Beside sums and statistics, a tile leaves the weights of the rows to sum: at most two (three at another
temperature than 1) of [R, tile] in the head's dtype, and none without gradients. Everything is deterministic.

Shapes: see gpu/kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_fdd.ops.gpu import launches as launches
from megatron_fdd.ops.gpu.blocks import cut_for
from megatron_fdd.ops.gpu.launches import BlockStatistics, LogitFactors, Pair, Peaks, Totals, Weights
from megatron_fdd.ops.kl_gradients import Normalisers, Upstream
from megatron_fdd.ops.plan import Model, Plan
from megatron_fdd.ops.softmax_sums import SoftmaxSums
from megatron_fdd.ops.vocab_tiles import product, product_dtype


class TritonSweeps:
    """See `chunks.Sweeps`. Without tokens nothing is launched."""

    def __init__(self, plan: Plan, teacher: Model | None, student: Model) -> None:
        self._plan = plan
        self._cut = cut_for(student[1].dtype)
        self._teacher = None if teacher is None else _as_read(teacher)
        self._student = _as_read(student)
        self._num_rows, self._num_valid = len(student[0]), plan.shard.num_valid
        block = self._cut.logits.columns
        self._most_blocks = max(1, -(-min(plan.kernels.tile_columns(student[1]), self._num_valid) // block))
        self._tile_size = self._most_blocks * block

    def softmax_sums(self) -> SoftmaxSums:
        """Online softmax over this rank's part of the vocabulary."""
        cut, crossing = self._cut.logits, self._plan.crossing
        sums = SoftmaxSums.nothing_seen(self._plan, self._teacher, self._student)
        statistics, weights = self._block_statistics(sums), self._weights(sums)
        lead = None if crossing is None else "student" if crossing.student_leads else "teacher"
        for pair in self._tiles(first=cut.columns):
            launches.softmax(pair, sums.peak_M, weights, statistics, lead, cut).run()
            before_M, target_M = sums.peak_M, torch.empty_like(sums.peak_M)
            sums.peak_M = torch.empty_like(before_M)
            totals = Totals(before_M, sums.peak_M, target_M, sums.mass_M, sums.unit_mass_M, sums.cross_R)
            for model in (sums.teacher, sums.student)[2 - sums.num_models :]:
                leads = crossing is not None and model == sums.lead
                launches.fold(statistics, totals, pair, self._cut, model=model, leads=leads).run()
            self._add_rows(sums, pair, weights, statistics.peak_BM[: pair.num_blocks(cut)], totals)
        return sums

    def mixture_sums(self, lse_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sums of value and score, [2, R]; and the sum of score * W_S above that of p_S * W_S, [M, S]."""
        plan, cut, count = self._plan, self._cut.logits, self._num_rows
        assert plan.mixture is not None
        sums_2R = lse_M.new_zeros(2, count)
        blocks_2BR = lse_M.new_empty(2, self._most_blocks, count)
        rows_MS = lse_M.new_zeros(2 * count, self._student[1].shape[1]) if plan.body_gradient else None
        weights = None if rows_MS is None else (self._room(), self._room())
        skips = rows_MS is not None and plan.kernels.skip_below > 0
        largest_BM = lse_M.new_empty(self._most_blocks, 2 * count) if skips else None
        for pair in self._tiles():
            statistics = (blocks_2BR[0], blocks_2BR[1], largest_BM)
            launches.mixture(pair, lse_M, weights, statistics, plan.mixture, cut).run()
            num_blocks = pair.num_blocks(cut)
            sums_2R += blocks_2BR[:, :num_blocks].sum(1)
            if rows_MS is None or weights is None:
                continue
            for rows, weights_RC in zip((slice(count), slice(count, None)), weights, strict=True):
                largest_BR = None if largest_BM is None else largest_BM[:num_blocks, rows]
                self._accumulate(rows_MS[rows], weights_RC, pair, largest_BR)
        return sums_2R, rows_MS

    def gradients(
        self,
        upstream: Upstream,
        normalisers: Normalisers,
        labels_R: Tensor | None,
        head_gradient_WS: Tensor | None,
    ) -> Tensor:
        """The hidden states' gradient [R, S], this rank's part; the head's is added to `head_gradient_WS`."""
        plan, weights_RC = self._plan, self._room()
        hidden_RS = self._student[0].to(product_dtype(self._student[0]))
        factors = _logit_factors(plan, upstream, normalisers, labels_R)
        gradient_RS = normalisers.lse_M.new_zeros(hidden_RS.shape)
        for pair in self._tiles(has_teacher=plan.divergence is not None):
            launches.gradient(pair, factors, weights_RC, plan.divergence, self._cut.logits).run()
            self._accumulate(gradient_RS, weights_RC, pair)
            if head_gradient_WS is not None:
                tile_RC = weights_RC[:, : pair.columns.stop - pair.columns.start].to(hidden_RS.dtype)
                head_gradient_WS[pair.columns] += product(tile_RC.T, hidden_RS, gradient_RS.dtype)
        return gradient_RS

    def _tiles(self, first: int = 0, *, has_teacher: bool = True) -> Iterator[Pair]:
        """Tiles of the vocabulary; if `first`, one of so many columns comes first.

        Exponentials are relative to the peaks of the tiles before: the first tile has none to be relative to.
        """
        teacher, temperature = self._teacher if has_teacher else None, self._plan.temperature
        starts = [0] if first == 0 else [0, first]
        starts += range(starts[-1] + self._tile_size, self._num_valid, self._tile_size)
        for start, stop in zip(starts, [*starts[1:], self._num_valid], strict=True):
            columns = slice(start, min(stop, self._num_valid))
            if self._num_rows > 0 and columns.start < columns.stop:
                yield Pair(teacher, self._student, columns, temperature)

    def _add_rows(
        self, sums: SoftmaxSums, pair: Pair, weights: Weights, block_peak_BM: Tensor, totals: Totals
    ) -> None:
        """Add a tile's part of every sum of rows."""
        parts = [(sums.unit_rows_RS, weights.unit_RC, sums.student, sums.temperature)]
        if sums.rows_MS is not None:
            own_RS = sums.rows_MS
            if weights.first_RC is not None:
                parts.append((sums.rows_MS[sums.teacher], weights.first_RC, sums.lead, 1.0))
                own_RS = sums.rows_MS[sums.student]
            parts.append((own_RS, weights.student_RC, sums.student, 1.0))
        limit = launches.leap_limit(self._student[1].dtype, sums.temperature)
        for rows_RS, weights_RC, model, power in parts:
            if rows_RS is None or weights_RC is None:
                continue
            peaks = Peaks(totals.before_M[model], totals.target_M[model], totals.peak_M[model], power)
            block_peak_BR = block_peak_BM[:, model]
            launches.rescale(weights_RC, block_peak_BR, peaks, limit, self._cut.logits).run()
            largest_BR = None
            if self._plan.kernels.skip_below > 0:  # the log-sum-exp is at least the running maximum
                largest_BR = (block_peak_BR - peaks.peak_R).mul_(power).exp_()
            self._accumulate(rows_RS, weights_RC, pair, largest_BR, peaks)

    def _accumulate(
        self,
        rows_RS: Tensor,
        weights_RC: Tensor,
        pair: Pair,
        largest_BR: Tensor | None = None,
        peaks: Peaks | None = None,
    ) -> None:
        """rows += weights @ head. `largest_BR`: probabilities by which blocks may be skipped; None: all count."""
        kept = None
        if largest_BR is not None:
            kept = launches.kept_blocks(largest_BR, self._plan.kernels.skip_below, self._cut)
        head_CS = self._student[1][pair.columns]
        launches.accumulate(rows_RS, weights_RC, head_CS, self._cut, peaks=peaks, kept=kept).run()

    def _room(self) -> Tensor:
        """For a tile's weights, [R, whole blocks]."""
        return self._student[1].new_empty(self._num_rows, self._tile_size)

    def _weights(self, sums: SoftmaxSums) -> Weights:
        """Room for the weights of the rows that are summed."""
        has_rows = sums.rows_MS is not None
        return Weights(
            first_RC=self._room() if has_rows and sums.cross_R is not None else None,
            student_RC=self._room() if has_rows else None,
            unit_RC=self._room() if sums.unit_rows_RS is not None else None,
        )

    def _block_statistics(self, sums: SoftmaxSums) -> BlockStatistics:
        """Room for the statistics of a tile's column blocks."""

        def room(like: Tensor | None) -> Tensor | None:
            return None if like is None else like.new_empty(self._most_blocks, len(like))

        peak_BM, mass_BM = sums.peak_M.new_empty(2, self._most_blocks, len(sums.peak_M))
        return BlockStatistics(peak_BM, mass_BM, room(sums.unit_mass_M), room(sums.cross_R))


def _logit_factors(
    plan: Plan, upstream: Upstream, normalisers: Normalisers, labels_R: Tensor | None
) -> LogitFactors:
    """score * up + p * (unit - centre * up) - label, as rows' factors."""
    scale_R = own_R = None
    if plan.divergence is not None:
        assert normalisers.centre_R is not None
        scale_R = upstream.divergence_R
        own_R = -normalisers.centre_R * scale_R
        if plan.unit and not plan.heated:
            own_R += upstream.unit_R
    return LogitFactors(
        lse_M=None if plan.divergence is None else normalisers.lse_M,
        unit_lse_R=normalisers.unit_lse_R,
        scale_R=scale_R,
        own_R=own_R,
        unit_R=upstream.unit_R if plan.divergence is None or plan.heated else None,
        label_R=None if labels_R is None else labels_R - plan.shard.first,
        label_scale_R=None if labels_R is None else upstream.label_R,
    )


def _as_read(model: Model) -> Model:
    hidden, head = model
    return hidden.to(head.dtype).contiguous(), head.detach().contiguous()
