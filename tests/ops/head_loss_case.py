"""The weighted loss of the final logits, and what it must be."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fdd.ops.head_loss import HeadLoss, LossWeights
from megatron_fdd.ops.linear_kl import Divergence
from tests.ops.linear_kl_case import (
    Case,
)

FACTOR = 3.0


def weights_of(case: Case, *, divergence: float = 0.7, entropy: float = 0.3) -> LossWeights:
    """Every token counts otherwise; every fifth not at all."""
    per_token = case.upstream.clone()
    per_token[:, ::5] = 0
    return LossWeights(per_token[0], per_token[2], divergence, entropy)


def weighted(result: HeadLoss, weights: LossWeights) -> Tensor:
    """The loss that the gradient is of, times a common factor."""
    parts = ((result.divergence, weights.divergence), (result.cross_entropy, weights.entropy))
    return FACTOR * torch.stack([value * weight for value, weight in parts if value is not None]).sum()


def reference(case: Case, divergence: Divergence | None, weights: LossWeights, *leaves: Tensor) -> HeadLoss:
    double = Case(case.teacher, case.teacher_head, *leaves, case.labels, case.upstream, case.vocab_size)
    outputs = double.reference(divergence)
    value = None if divergence is None else (outputs.divergence_N * weights.divergence_N).sum()
    return HeadLoss(value, (outputs.cross_entropy_N * weights.entropy_N).sum())
