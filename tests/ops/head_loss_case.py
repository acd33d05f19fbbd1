"""The weighted loss of the final logits, and its expected value."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_fdd.ops.head_loss import HeadLoss, LossWeights
from megatron_fdd.ops.linear_kl import Divergence
from tests.ops.linear_kl_case import (
    Case,
)

FACTOR = 3.0


def weights_of(case: Case, *, divergence: float = 0.7, entropy: float = 0.3) -> LossWeights:
    """Make weights that differ for every token; every fifth token has weight 0."""
    per_token = case.upstream.clone()
    per_token[:, ::5] = 0
    return LossWeights(per_token[0], per_token[2], divergence, entropy)


def scaled(result: HeadLoss) -> Tensor:
    """Multiply the loss by a factor, as a loss scale does."""
    return FACTOR * result.loss


def reference(case: Case, divergence: Divergence | None, weights: LossWeights, *leaves: Tensor) -> HeadLoss:
    double = replace(case, student=leaves[0], student_head=leaves[1])
    outputs = double.reference(divergence)
    entropy = (outputs.cross_entropy_N * weights.entropy_N).sum()
    if divergence is None:
        return HeadLoss(weights.entropy * entropy, None, entropy)
    value = (outputs.divergence_N * weights.divergence_N).sum()
    return HeadLoss(weights.divergence * value + weights.entropy * entropy, value, entropy)
