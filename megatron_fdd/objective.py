"""All terms of one micro-batch on the model chunk that holds its taps, weighted and summed.

Shape letters: S sequence (this rank's part), B micro-batch, N = S*B token rows in sequence-major order,
T and S (as a last letter) hidden width of teacher and student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fdd.config import FddConfig
from megatron_fdd.layer_plan import LayerPair
from megatron_fdd.lens import Lens
from megatron_fdd.losses import (
    HeadPair,
    LossTerm,
    Tap,
    TapStatistics,
    TokenWeights,
    delta_terms,
    final_terms,
    trajectory_term,
)
from megatron_fdd.ops.delta import HeadGrams, head_grams
from megatron_fdd.ops.linear_kl import Divergence, DivergenceKind, VocabShard
from megatron_fdd.teacher import TeacherFeatures

COUNTS = ("label_tokens", "term_tokens")


@dataclass(frozen=True, slots=True)
class StepScale:
    """What changes from step to step.

    Attributes:
        inner: factor of alpha and beta (warm-up, decay).
        label_per_term_token: global count of label tokens over the count that kd, trajectory and delta use.
            Megatron divides every gradient by one number, the label tokens of the step.
    """

    inner: float = 1.0
    label_per_term_token: float = 1.0


@dataclass(frozen=True, slots=True)
class StudentState:
    """What one forward pass of the student left on this chunk.

    Attributes:
        final_SBS: hidden states after the final norm.
        taps_SBS: outputs of the sampled blocks, before the norm.
        head_WS: output weight; the final-logit terms train it.
        lens: the student's lens for the inner layers, detached or live.
    """

    final_SBS: Tensor
    taps_SBS: Sequence[Tensor]
    head_WS: Tensor
    lens: Lens


class Objective:
    """The weighted sum of all terms. Holds nothing but the heads' Gram matrices of the current step."""

    def __init__(
        self, config: FddConfig, pairs: Sequence[LayerPair], shard: VocabShard, teacher_lens: Lens | None
    ) -> None:
        self.config = config
        self.pairs = tuple(pairs)
        self.shard = shard
        self.teacher_lens = teacher_lens
        self.scale = StepScale()
        self._grams: HeadGrams | None = None
        self._grams_are_fresh = False

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms of a micro-batch, in the order of the packed sums."""
        config, names = self.config, []
        if config.uses_final_head:
            names += ["ce"] + ["kd"] * (config.kd_weight > 0)
        if config.alpha > 0:
            names += [f"trajectory {pair.name}" for pair in self.pairs]
        if config.beta > 0:
            names += [f"delta {pair.name}" for pair in self.pairs[1:]]
        return tuple(names)

    def begin_step(self, scale: StepScale) -> None:
        """Start an optimizer (or evaluation) step: the student's head may have changed since the last one."""
        self.scale = scale
        self._grams_are_fresh = False

    def weight_of(self, name: str) -> float:
        """Factor of a term's token mean in the reported total."""
        config = self.config
        kind = name.split()[0]
        if kind == "trajectory":
            return config.alpha * self.scale.inner / len(self.pairs)
        if kind == "delta":
            return config.beta * self.scale.inner / (len(self.pairs) - 1)
        return config.ce_weight if kind == "ce" else config.kd_weight

    def __call__(
        self, student: StudentState, teacher: TeacherFeatures | None, labels_N: Tensor, weights: TokenWeights
    ) -> tuple[Tensor, Tensor]:
        """Loss of one micro-batch, and its parts.

        Args:
            labels_N: vocabulary ids of this rank's rows, negative where there is none.

        Returns:
            total: float32 scalar to back-propagate, a sum over this rank's rows.
            sums: float32 [len(COUNTS) + len(term_names)], detached, unweighted, for one packed reduction.

        Collectives over the tensor-parallel group: those of `linear_kl` once per tap and once for the final
        logits; in the first micro-batch of a step the all-reduce of the Gram matrices.
        """
        terms = self._final(student, teacher, labels_N, weights)
        if self.pairs:
            assert teacher is not None
            terms += self._inner(student, teacher, weights)
        by_name = {term.name: term for term in terms}
        # A schedule without a gradient for the chunk's input would hang (pitfalls: both final weights 0).
        total = student.final_SBS.flatten()[0].float() * 0.0
        for term in terms:
            factor = self.weight_of(term.name)
            if not term.counts_labels:
                factor *= self.scale.label_per_term_token
            total = total + factor * term.total
        counts = [weights.label_N.sum(), weights.term_N.sum()]
        sums = torch.stack(counts + [by_name[name].total.detach() for name in self.term_names])
        return total, sums

    def _final(
        self, student: StudentState, teacher: TeacherFeatures | None, labels_N: Tensor, weights: TokenWeights
    ) -> list[LossTerm]:
        config = self.config
        if not config.uses_final_head:
            return []
        divergence = teacher_NT = None
        if config.kd_weight > 0:
            assert teacher is not None
            divergence = self._divergence(config.kd_divergence)
            teacher_NT = teacher.final_SBT.flatten(0, 1)
        heads = self._heads(student.head_WS)
        return final_terms(teacher_NT, student.final_SBS.flatten(0, 1), labels_N, heads, divergence, weights)

    def _inner(
        self, student: StudentState, teacher: TeacherFeatures, weights: TokenWeights
    ) -> list[LossTerm]:
        config, lens = self.config, student.lens
        assert self.teacher_lens is not None
        assert len(student.taps_SBS) == len(teacher.taps_SBT) == len(self.pairs), "a tap was lost"
        taps = [
            Tap(pair.name, self.teacher_lens.features(teacher_SBT), lens.features(student_SBS))
            for pair, teacher_SBT, student_SBS in zip(
                self.pairs, teacher.taps_SBT, student.taps_SBS, strict=True
            )
        ]
        heads = self._heads(lens.head_WH)
        divergence = self._divergence(config.trajectory_divergence) if config.alpha > 0 else None
        with_lse = config.beta > 0 and config.delta == "logprob"
        terms: list[LossTerm] = []
        statistics: list[TapStatistics | None] = []
        for tap in taps:
            term, tap_statistics = trajectory_term(tap, heads, divergence, weights, with_lse=with_lse)
            terms += [] if term is None else [term]
            statistics.append(tap_statistics)
        if config.beta > 0:
            grams = self._current_grams(heads)
            terms += delta_terms(
                taps, statistics, grams, weights, detach_previous=config.delta_detach_previous
            )
        return terms

    def _current_grams(self, heads: HeadPair) -> HeadGrams:
        """Gram matrices of the heads as they are in this step; in live mode with a graph of their own."""
        if self._grams_are_fresh and self.config.lens_head == "detached":
            assert self._grams is not None
            return self._grams
        assert heads.teacher_WT is not None
        grams = head_grams(
            heads.teacher_WT,
            heads.student_WS,
            shard=self.shard,
            centred=self.config.delta == "centred",
            previous=self._grams,
        )
        self._grams, self._grams_are_fresh = grams, True
        return grams

    def _heads(self, student_WS: Tensor) -> HeadPair:
        teacher_WT = None if self.teacher_lens is None else self.teacher_lens.head_WH
        return HeadPair(teacher_WT, student_WS, self.shard)

    def _divergence(self, kind: DivergenceKind) -> Divergence:
        return Divergence(kind, self.config.divergence_mix, self.config.temperature)
