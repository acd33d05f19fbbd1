"""Gradients of linear_kl from the forward sweeps' sums (constant head), and what one more sweep needs (trained head).

Shapes: R tokens, M rows = R per model (teacher's first, student's last), S the student's width, W rows of the
head shard. All gradients here are this rank's part: the sum over its vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fdd.ops.plan import Plan
from megatron_fdd.ops.softmax_sums import MixtureSums, SoftmaxSums, VocabStatistics
from megatron_fdd.ops.vocab_shard import VocabShard, label_rows


class Upstream(NamedTuple):
    """What the loss gives back per token."""

    divergence_R: Tensor  # times T: d(T^2 value) / d(logit) = T d(value) / d(logit / T)
    unit_R: Tensor  # for the student's lse at temperature 1, the cross-entropy's share included
    label_R: Tensor  # for the cross-entropy alone, 0 without a label


class Pulls(NamedTuple):
    """Derivatives with respect to the student's hidden states, for upstream gradients of 1."""

    divergence_RS: Tensor | None
    unit_RS: Tensor | None


class Normalisers(NamedTuple):
    """What a sweep needs to recompute probabilities and the divergence's gradient."""

    lse_M: Tensor
    unit_lse_R: Tensor  # the student's, at temperature 1
    centre_R: Tensor | None  # expectation of the divergence's score; see Divergence.summands


def normalisers_of(plan: Plan, statistics: VocabStatistics, mixture: MixtureSums | None) -> Normalisers:
    """What the backward sweep of a trained head keeps."""
    centre_R = statistics.kl_R if mixture is None else mixture.centre_R
    if plan.crossing is not None and not plan.crossing.student_leads:
        centre_R = torch.full_like(statistics.lse_M[: len(statistics.lse_M) // 2], -1.0)
    return Normalisers(statistics.lse_M, statistics.unit_lse_M.view(statistics.num_models, -1)[-1], centre_R)


def pulls_of(
    plan: Plan, sums: SoftmaxSums, statistics: VocabStatistics, mixture: MixtureSums | None
) -> Pulls:
    """Turn a constant head's sums into derivatives; overwrites the sums."""
    unit_RS = sums.unit_rows_RS
    if unit_RS is not None:
        unit_RS.mul_(statistics.unit_scale_M[sums.student, None])
    scale_M = statistics.scale_M[:, None]
    rows_MS = sums.rows_MS if mixture is None else mixture.rows_MS
    assert rows_MS is not None
    if plan.divergence is None:
        return Pulls(None, rows_MS.mul_(scale_M[sums.student]))
    first_RS, student_RS = rows_MS[sums.teacher], rows_MS[sums.student]
    centre_R = statistics.cross_R if mixture is None else mixture.centre_R
    assert centre_R is not None
    if mixture is None:
        first_RS.mul_(scale_M[sums.lead])
        student_RS.mul_(scale_M[sums.student])
    if plan.divergence.kind == "fkl":
        first_RS.neg_().add_(student_RS)
    else:
        first_RS.addcmul_(student_RS, centre_R[:, None], value=-1)
    if plan.unit and not plan.heated:
        return Pulls(first_RS, student_RS)
    return Pulls(first_RS.clone(), unit_RS)  # a copy, so that the other half of the sums is freed


def pulled_gradient(
    upstream: Upstream, pulled: Pulls, head_WS: Tensor | None, labels_R: Tensor | None, shard: VocabShard
) -> Tensor:
    """The hidden states' gradient [R, S] for a constant head."""
    parts = zip(pulled, (upstream.divergence_R, upstream.unit_R), strict=True)
    terms = [pull * scale_R[:, None] for pull, scale_R in parts if pull is not None]
    gradient_RS = terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
    if labels_R is not None:
        assert head_WS is not None
        rows_RS = label_rows(head_WS, labels_R, shard)
        gradient_RS.addcmul_(rows_RS, upstream.label_R[:, None], value=-1)
    return gradient_RS
