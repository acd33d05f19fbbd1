"""Gradients of linear_kl from the forward sweeps' sums (constant head), and inputs of one more sweep (trained head).

Shapes: R tokens, M rows = R per model (teacher's first, student's last), D the student's width, W rows of the
head shard. All gradients here are this rank's part: the sum over its slice of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fdd.ops.request import Request
from megatron_fdd.ops.softmax_sums import SecondSums, SoftmaxSums, VocabStatistics
from megatron_fdd.ops.vocab_shard import VocabShard, label_rows


class Upstream(NamedTuple):
    """Gradients of the loss with respect to the outputs, one for each token."""

    # Includes the temperature: d(temperature**2 value) / d(logit) = temperature d(value) / d(logit / temperature).
    divergence_R: Tensor
    unit_R: Tensor  # for the student's lse at temperature 1, the cross-entropy's share included
    label_R: Tensor  # for the product of the label's row and the hidden state, 0 without a label


class Pulls(NamedTuple):
    """Derivatives with respect to the student's hidden states, for upstream gradients of 1."""

    divergence_RD: Tensor | None
    unit_RD: Tensor | None


class Normalisers(NamedTuple):
    """Statistics from which a sweep recomputes probabilities and the divergence's gradient."""

    lse_M: Tensor
    unit_lse_R: Tensor  # the student's, at temperature 1
    centre_R: Tensor | None  # expectation of the divergence's score; see Divergence.score


def label_slope(request: Request, statistics: VocabStatistics, labels_R: Tensor | None) -> Tensor | None:
    """Return the derivative of each label's logit with respect to its product, [R]; None if it is 1 for all."""
    if labels_R is None or statistics.label_logit_R is None:
        return None
    slope_R = request.student_extras.slope(statistics.label_logit_R)
    return None if slope_R is None else slope_R.masked_fill_(labels_R < 0, 0.0)


def normalisers_of(request: Request, statistics: VocabStatistics, second: SecondSums | None) -> Normalisers:
    """Return the statistics that the backward sweep of a trained head needs."""
    centre_R = statistics.kl_R if second is None else second.centre_R
    if request.divergence is not None and request.divergence.teacher_leads:
        centre_R = torch.full_like(statistics.lse_M[: len(statistics.lse_M) // 2], -1.0)
    return Normalisers(statistics.lse_M, statistics.unit_lse_M.view(statistics.num_models, -1)[-1], centre_R)


def pulls_of(
    request: Request, sums: SoftmaxSums, statistics: VocabStatistics, second: SecondSums | None
) -> Pulls:
    """Turn a constant head's sums into derivatives; overwrites the sums."""
    unit_RD = sums.unit_rows_RD
    if unit_RD is not None:
        unit_RD.mul_(statistics.unit_scale_M[sums.student, None])
    scale_M = statistics.scale_M[:, None]
    rows_MD = sums.rows_MD if second is None else second.rows_MD
    assert rows_MD is not None
    if request.divergence is None:
        return Pulls(None, rows_MD.mul_(scale_M[sums.student]))
    first_RD, student_RD = rows_MD[sums.teacher], rows_MD[sums.student]
    centre_R = statistics.cross_R if second is None else second.centre_R
    assert centre_R is not None
    if second is None:
        first_RD.mul_(scale_M[sums.lead])
        student_RD.mul_(scale_M[sums.student])
    if request.divergence.teacher_leads:
        first_RD.neg_().add_(student_RD)
    else:
        first_RD.addcmul_(student_RD, centre_R[:, None], value=-1)
    if request.needs_temperature_one and not request.needs_both_temperatures:
        return Pulls(first_RD, student_RD)
    return Pulls(first_RD.clone(), unit_RD)  # a copy frees the other half of the sums


def pulled_gradient(
    upstream: Upstream, pulled: Pulls, head_WD: Tensor | None, labels_R: Tensor | None, shard: VocabShard
) -> Tensor:
    """Return the hidden states' gradient [R, D] for a constant head."""
    parts = zip(pulled, (upstream.divergence_R, upstream.unit_R), strict=True)
    terms = [pull * scale_R[:, None] for pull, scale_R in parts if pull is not None]
    gradient_RD = terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
    if labels_R is not None:
        assert head_WD is not None
        rows_RD = label_rows(head_WD, labels_R, shard)
        gradient_RD.addcmul_(rows_RD, upstream.label_R[:, None], value=-1)
    return gradient_RD
