"""The terms of the distillation loss, from features and heads. Usable without Megatron.

Shape letters: N this rank's token rows, T and D hidden width of teacher and student,
W this rank's slice of the vocabulary, K sampled layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_fdd.ops.delta import HeadGrams, delta_cosine
from megatron_fdd.ops.head_loss import LossWeights, head_loss, masked_sum
from megatron_fdd.ops.linear_kl import (
    DEFAULT_IMPLEMENTATION,
    Divergence,
    Implementation,
    VocabShard,
    linear_kl,
)
from megatron_fdd.ops.request import Model


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One term of the loss, summed over this rank's token rows.

    Attributes:
        total: float32 scalar; carries gradient.
        counts_labels: its mean is over tokens with a label (else over the tokens that `--fdd-tokens` chose).
    """

    name: str
    total: Tensor
    counts_labels: bool = False


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """1 for a row that counts, else 0; float32 [N]. `term_N` is for kd, trajectory and delta."""

    label_N: Tensor
    term_N: Tensor


@dataclass(frozen=True, slots=True)
class HeadPair:
    """Both models' heads at this rank: rows of the same vocabulary slice."""

    teacher_WT: Tensor | None
    student_WD: Tensor
    shard: VocabShard
    implementation: Implementation = DEFAULT_IMPLEMENTATION

    def teacher(self, hidden_NT: Tensor | None) -> Model:
        """Hidden states with their head."""
        assert hidden_NT is not None
        assert self.teacher_WT is not None
        return hidden_NT, self.teacher_WT


@dataclass(frozen=True, slots=True)
class Tap:
    """Features of a sampled layer pair, after each model's final norm (float32)."""

    name: str
    teacher_NT: Tensor
    student_ND: Tensor


@dataclass(frozen=True, slots=True)
class TapStatistics:
    """What the delta needs of a tap beside its features: log-sum-exp of both models, float32 [N]."""

    teacher_lse_N: Tensor
    student_lse_N: Tensor


def final_terms(
    teacher_NT: Tensor | None,
    student_ND: Tensor,
    labels_N: Tensor,
    heads: HeadPair,
    divergence: Divergence | None,
    weights: LossWeights,
) -> list[LossTerm]:
    """Final-logit distillation (unless `divergence` is None) and cross-entropy, in one pass over the head.

    Args:
        teacher_NT, student_ND: final hidden states, normed, in the heads' dtypes.
        labels_N: vocabulary ids; negative where there is no label.
        weights: of the tokens, and of both terms in the loss.

    Collectives: those of `head_loss`, once.
    """
    result = head_loss(
        None if divergence is None else heads.teacher(teacher_NT),
        (student_ND, heads.student_WD),
        shard=heads.shard,
        divergence=divergence,
        labels_N=labels_N,
        weights=weights,
        implementation=heads.implementation,
    )
    assert result.cross_entropy is not None
    terms = [LossTerm("ce", result.cross_entropy, counts_labels=True)]
    return terms if result.divergence is None else [*terms, LossTerm("kd", result.divergence)]


def trajectory_term(
    tap: Tap, heads: HeadPair, divergence: Divergence | None, weights: TokenWeights, *, with_lse: bool
) -> tuple[LossTerm | None, TapStatistics | None]:
    """One sampled layer's divergence through the lens, and what its deltas need.

    Args:
        divergence: None when only the log-sum-exps are wanted (alpha 0).
        with_lse: a log-probability delta follows, so the log-sum-exp must carry gradient.

    Collectives: those of `linear_kl`, once; without lse, and for a constant head, those of `head_loss`.
    """
    if divergence is None and not with_lse:
        return None, None
    assert heads.teacher_WT is not None
    teacher = heads.teacher(tap.teacher_NT.to(heads.teacher_WT.dtype))
    student = (tap.student_ND.to(heads.student_WD.dtype), heads.student_WD)
    name, shard, implementation = f"trajectory {tap.name}", heads.shard, heads.implementation
    if not with_lse and not heads.student_WD.requires_grad:
        # A trained head's gradient would be kept until the backward pass, for every tap.
        alone = LossWeights(weights.term_N, weights.label_N, divergence=1.0, entropy=0.0)
        summed = head_loss(
            teacher,
            student,
            shard=shard,
            divergence=divergence,
            labels_N=None,
            weights=alone,
            implementation=implementation,
        )
        assert summed.divergence is not None
        return LossTerm(name, summed.divergence), None
    result = linear_kl(
        *teacher,
        *student,
        shard=shard,
        divergence=divergence,
        needs_lse=with_lse,
        implementation=implementation,
    )
    statistics = None
    if result.teacher_lse_N is not None and result.student_lse_N is not None:
        statistics = TapStatistics(result.teacher_lse_N, result.student_lse_N)
    if result.divergence_N is None:
        return None, statistics
    return LossTerm(name, masked_sum(result.divergence_N, weights.term_N)), statistics


def delta_terms(
    taps: Sequence[Tap],
    statistics: Sequence[TapStatistics | None],
    grams: HeadGrams,
    weights: TokenWeights,
    *,
    detach_previous: bool,
    shard: VocabShard,
) -> list[LossTerm]:
    """1 - cos of both models' change of prediction between adjacent sampled layers; named by the later one.

    Args:
        statistics: one per tap for the log-probability delta; None for the centred one.

    Collectives over the tensor-parallel group: those of `delta_cosine`, once per term.
    """
    terms = []
    for index in range(1, len(taps)):
        previous, current = taps[index - 1], taps[index]
        student_previous_ND = previous.student_ND
        if detach_previous:
            student_previous_ND = student_previous_ND.detach()
        teacher_lse_delta_N = student_lse_delta_N = None
        before, after = statistics[index - 1], statistics[index]
        if before is not None and after is not None:
            student_lse_before_N = before.student_lse_N.detach() if detach_previous else before.student_lse_N
            teacher_lse_delta_N = after.teacher_lse_N - before.teacher_lse_N
            student_lse_delta_N = after.student_lse_N - student_lse_before_N
        cosine_N = delta_cosine(
            current.teacher_NT - previous.teacher_NT,
            current.student_ND - student_previous_ND,
            teacher_lse_delta_N,
            student_lse_delta_N,
            grams,
            shard=shard,
        )
        terms.append(LossTerm(f"delta {current.name}", masked_sum(1 - cosine_N, weights.term_N)))
    return terms
