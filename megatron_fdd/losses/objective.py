"""All terms of one micro-batch on the model chunk that holds its taps, weighted and summed.

Shape letters: S sequence (this rank's part), B micro-batch, N = S*B token rows in sequence-major order,
T and D hidden width of teacher and student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.carry import Carry
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.losses.layer_plan import ChunkPlan, LayerPair
from megatron_fdd.losses.lens import Lens
from megatron_fdd.losses.sampling import EVERYTHING, RowSample, StepDraw
from megatron_fdd.losses.terms import (
    HeadPair,
    LossTerm,
    Tap,
    TokenWeights,
    delta_terms,
    final_terms,
    trajectory_term,
)
from megatron_fdd.ops.delta import HeadGrams, head_grams
from megatron_fdd.ops.head_loss import LossWeights
from megatron_fdd.ops.linear_kl import Divergence, DivergenceKind, Implementation, VocabShard

COUNTS = ("label_tokens", "term_tokens")


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What changes from step to step.

    Attributes:
        inner: factor of alpha and beta (warm-up, decay).
        label_per_term_token: global count of label tokens over the count that kd, trajectory and delta use.
            Megatron divides every gradient by one number, the label tokens of the step.
        draw: what trajectory and delta look at.
    """

    inner: float = 1.0
    label_per_term_token: float = 1.0
    draw: StepDraw = EVERYTHING


class StepGrams:
    """The heads' Gram matrices of the current step, for all chunks of a stage."""

    def __init__(self, config: FddConfig, shard: VocabShard) -> None:
        self._config = config
        self._shard = shard
        self._grams: HeadGrams | None = None
        self._are_fresh = False

    def begin_step(self) -> None:
        """The student's head may have changed since the last one."""
        self._are_fresh = False

    def current(self, heads: HeadPair) -> HeadGrams:
        """Of the heads as they are in this step; for a live head with a graph of their own each time.

        Collectives over the tensor-parallel group: those of `head_grams`, once per step.
        """
        if self._are_fresh and self._config.lens_head == "detached":
            assert self._grams is not None
            return self._grams
        assert heads.teacher_WT is not None
        self._grams = head_grams(
            heads.teacher_WT,
            heads.student_WD,
            shard=self._shard,
            centred=self._config.delta == "centred",
            previous=self._grams,
        )
        self._are_fresh = True
        return self._grams


class Objective:
    """The terms of one chunk and their weighted sum.

    Args:
        pairs: all of the run's; `chunk` says which of them this chunk holds.
        grams: shared by the chunks of a stage.
    """

    def __init__(
        self,
        config: FddConfig,
        pairs: Sequence[LayerPair],
        chunk: ChunkPlan,
        shard: VocabShard,
        grams: StepGrams,
    ) -> None:
        self.config = config
        self.pairs = tuple(pairs)
        self.chunk = chunk
        self.shard = shard
        self.teacher_lens: Lens | None = None
        self.scale = StepSettings()
        self._grams = grams

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the run's terms, in the order of the packed sums; the same for every chunk."""
        config, names = self.config, []
        if config.uses_final_head:
            names += ["ce"] + ["kd"] * (config.kd_weight > 0)
        if config.alpha > 0:
            names += [f"trajectory {pair.name}" for pair in self.pairs]
        if config.beta > 0:
            names += [f"delta {pair.name}" for pair in self.pairs[1:]]
        return tuple(names)

    @property
    def carries_lse(self) -> bool:
        """Whether a carry holds log-sum-exps."""
        return self.config.delta == "logprob"

    def begin_step(self, scale: StepSettings) -> None:
        """Start an optimizer (or evaluation) step."""
        self.scale = scale
        self._grams.begin_step()

    def weight_of(self, name: str) -> float:
        """Factor of a term's token mean in the reported total."""
        config = self.config
        kind = name.split()[0]
        if kind == "trajectory":
            return config.alpha * self.scale.inner / len(self.pairs)
        if kind == "delta":
            return config.beta * self.scale.inner / (len(self.pairs) - 1)
        return config.ce_weight if kind == "ce" else config.kd_weight

    def measured(self, name: str, value: float) -> float | None:
        """What a step saw of a reported mean: with one tap a step, a layer's term is that tap's own, or None.

        Args:
            value: the mean as reported, in which a tap counts for those that were not looked at.
        """
        draw, (kind, _, pair) = self.scale.draw, name.partition(" ")
        if draw.tap is None or kind not in ("trajectory", "delta") or not pair:
            return value
        is_drawn = pair == self.pairs[draw.tap].name
        return value / draw.factor if is_drawn else None

    def total(self, terms: Sequence[LossTerm]) -> Tensor | None:
        """The weighted sum to back-propagate, float32, over this rank's rows; None without a term."""
        parts = []
        for term in terms:
            factor = self.weight_of(term.name)
            if not term.counts_labels:
                factor *= self.scale.label_per_term_token
            parts.append(factor * term.total)
        return torch.stack(parts).sum() if parts else None

    def sums(self, terms: Sequence[LossTerm], weights: TokenWeights) -> Tensor:
        """Unweighted, detached sums, float32 [len(COUNTS) + len(term_names)]; 0 for other chunks' terms.

        Tokens are counted by the last chunk only.
        """
        counts = [weights.label_N.sum(), weights.term_N.sum()]
        if not self.chunk.is_last:
            counts = [torch.zeros_like(count) for count in counts]
        by_name = {term.name: term.total.detach() for term in terms}
        zero = torch.zeros_like(counts[0])
        return torch.stack(counts + [by_name.get(name, zero) for name in self.term_names])

    def final(
        self,
        final_SBD: Tensor,
        head_WD: Tensor,
        teacher: TeacherFeatures | None,
        labels_N: Tensor,
        weights: TokenWeights,
        loss_scale: Tensor | None = None,
    ) -> list[LossTerm]:
        """Final-logit distillation and cross-entropy, on the last chunk.

        Args:
            final_SBD: hidden states after the final norm.
            head_WD: output weight, which these terms train.
            labels_N: vocabulary ids of this rank's rows, negative where there is none.
            loss_scale: what `total` will be multiplied with in the backward pass, where that is known.

        Collectives over the tensor-parallel group: those of `head_loss` once.
        """
        config = self.config
        if not config.uses_final_head:
            return []
        divergence = teacher_NT = None
        if config.kd_weight > 0:
            assert teacher is not None
            assert teacher.final_SBT is not None
            divergence = self._divergence(config.kd_divergence)
            teacher_NT = teacher.final_SBT.flatten(0, 1)
        loss_weights = LossWeights(
            weights.term_N,
            weights.label_N,
            divergence=config.kd_weight * self.scale.label_per_term_token,
            entropy=config.ce_weight,
            factor=loss_scale,
        )
        return final_terms(
            teacher_NT, final_SBD.flatten(0, 1), labels_N, self._heads(head_WD), divergence, loss_weights
        )

    def inner(
        self,
        taps_SBD: Sequence[Tensor],
        carry: Carry | None,
        lens: Lens,
        teacher: TeacherFeatures,
        sample: RowSample,
    ) -> tuple[list[LossTerm], Carry | None]:
        """Trajectory and delta of this chunk's sampled layers, and what the next chunk needs of them.

        Args:
            taps_SBD: outputs of the sampled blocks, before the norm, in depth order.
            carry: from the chunk before, as the plan says.
            lens: the student's, detached or live.
            sample: which token rows count, and how much (`StepDraw.rows`).

        Collectives over the tensor-parallel group: those of `linear_kl` (or `head_loss`) once per tap that the step
        looks at and of `delta_cosine` once per delta; in the first micro-batch of a step the all-reduce of the Gram
        matrices.
        """
        chunk, config, draw = self.chunk, self.config, self.scale.draw
        assert len(taps_SBD) == len(chunk.pairs), "a tap was lost"
        divergence = self._divergence(config.trajectory_divergence) if config.alpha > 0 else None
        with_lse = config.beta > 0 and config.delta == "logprob" and draw.has_delta
        heads = self._heads(lens.head_WH)
        taps, statistics, terms = [], [], []
        if carry is not None and draw.counts(chunk.pairs[0]):
            assert chunk.carry_in is not None
            taps.append(self._tap(chunk.carry_in, carry.hidden_SBD, lens, teacher, sample))
            statistics.append(sample.gather(carry.statistics))
        for index, hidden_SBD in zip(chunk.pairs, taps_SBD, strict=True):
            if not draw.looks_at(index):
                continue
            taps.append(self._tap(index, hidden_SBD, lens, teacher, sample))
            wanted = divergence if draw.counts(index) else None
            term, tap_statistics = trajectory_term(taps[-1], heads, wanted, sample.weights, with_lse=with_lse)
            terms += [] if term is None else [term]
            statistics.append(tap_statistics)
        if config.beta > 0 and len(taps) > 1:
            grams = self._grams.current(heads)
            terms += delta_terms(
                taps,
                statistics,
                grams,
                sample.weights,
                detach_previous=config.delta_detach_previous,
                shard=heads.shard,
            )
        if chunk.carry_out is None:
            return terms, None
        last = statistics[-1] if draw.looks_at(chunk.pairs[-1]) else None
        return terms, Carry(taps_SBD[-1], sample.scatter(last) if self.carries_lse else None)

    def _tap(
        self, index: int, hidden_SBD: Tensor, lens: Lens, teacher: TeacherFeatures, sample: RowSample
    ) -> Tap:
        assert self.teacher_lens is not None
        teacher_NT = self.teacher_lens.features(sample.hidden(teacher.taps_SBT[index]))
        return Tap(self.pairs[index].name, teacher_NT, lens.features(sample.hidden(hidden_SBD)))

    def _heads(self, student_WD: Tensor) -> HeadPair:
        teacher_WT = None if self.teacher_lens is None else self.teacher_lens.head_WH
        implementation = Implementation(self.config.kernels, skip_below=self.config.skip_below)
        return HeadPair(teacher_WT, student_WD, self.shard, implementation)

    def _divergence(self, kind: DivergenceKind) -> Divergence:
        return Divergence(kind, self.config.divergence_mix, self.config.temperature)
