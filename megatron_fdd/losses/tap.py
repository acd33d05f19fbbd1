"""One sampled pair of layers in one micro-batch: features of both models, and statistics of their predictions.

Shape letters: M token rows of this rank that are looked at, T and D hidden width of teacher and student.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.ops.head_loss import LossWeights, head_loss, masked_sum
from megatron_fdd.ops.linear_kl import Divergence, Heads, linear_kl


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """The weights of rows, float32 [M]: 0 for a row that does not count.

    `term_N` is for kd and inner layers' terms. A drawn row counts for others too, and weighs more than 1.
    """

    label_N: Tensor
    term_N: Tensor


@dataclass(frozen=True, slots=True)
class TapStatistics:
    """Log-sum-exp of both models' predictions from a tap, float32 [M]; the student's carries gradient."""

    teacher_lse_N: Tensor
    student_lse_N: Tensor


@dataclass(frozen=True, slots=True)
class Features:
    """A layer's output of both models, on the rows that are looked at.

    Attributes:
        teacher_hidden_MT, student_hidden_MD: before the norm, in the models' dtype.
        teacher_MT, student_MD: after each model's lens norm, float32.
    """

    teacher_hidden_MT: Tensor
    student_hidden_MD: Tensor
    teacher_MT: Tensor
    student_MD: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.teacher_hidden_MT, self.student_hidden_MD, self.teacher_MT, self.student_MD


@dataclass(frozen=True, slots=True)
class Tap:
    """A sampled layer pair.

    Attributes:
        divergence: of the predictions through the lens, summed over the rows; None where no term asks for it.
        statistics: None where no term asks for them.
    """

    pair: LayerPair
    features: Features
    divergence: Tensor | None = None
    statistics: TapStatistics | None = None


@dataclass(frozen=True, slots=True)
class TapWindow:
    """A tap, and the one before it if there is one; the terms of inner layers see both."""

    current: Tap
    previous: Tap | None


def measure(
    features: Features,
    heads: Heads,
    divergence: Divergence | None,
    weights: TokenWeights,
    *,
    with_lse: bool,
) -> tuple[Tensor | None, TapStatistics | None]:
    """Compare both models' predictions from a tap, through the lens, in one pass over the vocabulary.

    Args:
        divergence: None: not asked for.
        with_lse: whether log-sum-exps are asked for, the student's with gradient.

    Returns:
        The divergence's sum over the rows, float32 with gradient, and the log-sum-exps.

    Collectives: those of `linear_kl`, once; without lse, and for a constant head, those of `head_loss`.
    """
    if divergence is None and not with_lse:
        return None, None
    assert heads.teacher_WT is not None
    teacher_MT = features.teacher_MT.to(heads.teacher_WT.dtype)
    student_MD = features.student_MD.to(heads.student_WD.dtype)
    if not with_lse and not heads.student_WD.requires_grad:
        # A trained head's gradient would be kept until the backward pass, for every tap.
        alone = LossWeights(weights.term_N, weights.label_N, divergence=1.0, entropy=0.0)
        summed = head_loss(teacher_MT, student_MD, heads, divergence=divergence, labels_N=None, weights=alone)
        return summed.loss, None
    result = linear_kl(teacher_MT, student_MD, heads, divergence=divergence, needs_lse=with_lse)
    statistics = None
    if result.teacher_lse_N is not None and result.student_lse_N is not None:
        statistics = TapStatistics(result.teacher_lse_N, result.student_lse_N)
    if result.divergence_N is None:
        return None, statistics
    return masked_sum(result.divergence_N, weights.term_N), statistics
