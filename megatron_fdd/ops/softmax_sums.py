"""The sums of forward sweeps, and their merge over the ranks into statistics of the whole vocabulary.

Shapes: R tokens, M rows = R per model (teacher's first, student's last), D the student's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fdd.ops.heads import Model
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.vocab_shard import Pending, VocabShard, join_label_logits
from megatron_fdd.ops.vocab_tiles import statistics_dtype


@dataclass(slots=True)
class SoftmaxSums:
    """Sums over the part of the vocabulary seen so far, relative to a running maximum (online softmax).

    With e = exp(logits - peak), z the logits over the temperature:
    peak_M, mass_M = sum e; unit_mass_M = sum e^temperature;
    cross_R = sum e_lead (z_S - z_T), lead = T for fkl, S for rkl;
    rows_MD: sum e_T W_S, then sum e_S W_S (for rkl, sum e_S (z_S - z_T) W_S comes first);
    without a divergence it is sum e_S W_S alone; unit_rows_RD = sum e_S^temperature W_S.
    """

    num_models: int
    temperature: float
    student_leads: bool
    peak_M: Tensor
    mass_M: Tensor
    unit_mass_M: Tensor | None
    cross_R: Tensor | None
    rows_MD: Tensor | None
    unit_rows_RD: Tensor | None

    @classmethod
    def nothing_seen(cls, request: Request, teacher: Model | None, student: Model) -> SoftmaxSums:
        """Return the sums that `request` asks for, over an empty part of the vocabulary."""
        hidden_RD = student[0]
        count, width = hidden_RD.shape
        num_models = 1 if teacher is None else 2
        total = num_models * count

        def zeros(*shape: int) -> Tensor:
            return hidden_RD.new_zeros(shape, dtype=statistics_dtype(hidden_RD))

        has_rows = request.body_gradient and not request.two_sweep
        return cls(
            num_models=num_models,
            temperature=request.temperature,
            student_leads=request.one_sweep is not None and request.one_sweep.student_leads,
            peak_M=zeros(total).fill_(-torch.inf),
            mass_M=zeros(total),
            unit_mass_M=zeros(total) if request.needs_both_temperatures else None,
            cross_R=zeros(count) if request.one_sweep else None,
            rows_MD=zeros(total if request.one_sweep else count, width) if has_rows else None,
            unit_rows_RD=zeros(count, width)
            if request.body_gradient and request.needs_both_temperatures
            else None,
        )

    @property
    def teacher(self) -> slice:
        """The teacher's rows of M."""
        return slice(0, len(self.peak_M) // self.num_models)

    @property
    def student(self) -> slice:
        """The student's rows of M."""
        return slice(len(self.peak_M) // self.num_models * (self.num_models - 1), len(self.peak_M))

    @property
    def lead(self) -> slice:
        """Rows of the model under which the divergence's expectation is taken."""
        return self.student if self.student_leads else self.teacher


@dataclass(frozen=True, slots=True)
class VocabStatistics:
    """Statistics over the whole vocabulary."""

    num_models: int
    lse_M: Tensor  # of the logits over the temperature
    scale_M: Tensor  # turns this rank's sums of exponentials into sums of probabilities
    unit_lse_M: Tensor  # at temperature 1
    unit_scale_M: Tensor
    kl_R: Tensor | None  # value of a one-sweep divergence, without temperature**2
    cross_R: Tensor | None  # expectation of z_S - z_T under the leading model
    label_logit_R: Tensor | None


def start_merge(sums: SoftmaxSums, label_logit_R: Tensor | None, shard: VocabShard) -> Pending:
    """Start to exchange the ranks' sums. Collectives: one all-gather of everything, packed."""
    pieces = [sums.peak_M, sums.mass_M, sums.unit_mass_M, sums.cross_R, label_logit_R]
    return shard.start_stack(torch.cat([piece for piece in pieces if piece is not None]))


def merge(sums: SoftmaxSums, packed: Pending, shard: VocabShard, *, has_labels: bool) -> VocabStatistics:
    """Combine the ranks' sums when `packed`, the result of `start_merge`, has arrived. No collective."""
    pieces = [sums.peak_M, sums.mass_M, sums.unit_mass_M, sums.cross_R]
    sizes = [0 if piece is None else len(piece) for piece in pieces]
    sizes.append(len(sums.peak_M) // sums.num_models if has_labels else 0)
    peaks, masses, *rest = packed.wait().split(sizes, dim=1)
    unit_masses, crosses, label_logits = (
        part if present else None
        for part, present in zip(
            rest, (sums.unit_mass_M is not None, sums.cross_R is not None, has_labels), strict=True
        )
    )

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
        # Not from the two lse: differences of similar numbers round like the divergence, not like the logits.
        peak_gap_R = peak_M[sums.student] - peak_M[sums.teacher]
        kl_R = peak_gap_R - cross_R + (log_mass_M[sums.student] - log_mass_M[sums.teacher])
        kl_R = -kl_R if sums.lead == sums.student else kl_R
    label_logit_R = None if label_logits is None else join_label_logits(label_logits)
    return VocabStatistics(
        sums.num_models, lse_M, scale_M, unit_lse_M, unit_scale_M, kl_R, cross_R, label_logit_R
    )


class SecondSums(NamedTuple):
    """Sums of the second sweep over the whole vocabulary; only `rows_MD` is this rank's part."""

    value_R: Tensor  # the divergence, without temperature**2
    centre_R: Tensor  # sum of its score, see Divergence.score
    rows_MD: Tensor | None  # sum of score * W_S, then sum of p_S * W_S
