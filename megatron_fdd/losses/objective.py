"""The loss of one micro-batch on the model chunk that holds its taps: all terms, weighted and summed.

Shape letters: S sequence (this rank's part), B micro-batch, N = S*B token rows in sequence-major order,
T and D hidden width of teacher and student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.carry import Carry
from megatron_fdd.losses.chunk_loss import ChunkLoss, StepSettings
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.losses.inner_pass import inner_pass, is_in_pass, knows_all_gradients
from megatron_fdd.losses.layer_plan import ChunkPlan
from megatron_fdd.losses.lens import Lens, TeacherLens
from megatron_fdd.losses.own_term import ask_needs
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.losses.sampling import RowSample
from megatron_fdd.losses.tap import Features, Tap, TapWindow, TokenWeights, measure
from megatron_fdd.losses.term import TapContext, computed
from megatron_fdd.losses.term_modules import NO_MODULES, TapModules
from megatron_fdd.losses.terms import (
    CrossEntropy,
    LogitKD,
    Part,
    needs_of,
    parts_of,
    tap_terms,
    uses_final_head,
)
from megatron_fdd.ops.head_grams import StepGrams
from megatron_fdd.ops.head_loss import LossWeights, head_loss
from megatron_fdd.ops.inner_loss import is_worth_it
from megatron_fdd.ops.linear_kl import Divergence, Heads, Implementation, VocabShard

COUNTS = ("label_tokens", "term_tokens")


class Objective:
    """The terms of one chunk and their weighted sum.

    Args:
        pairs: all of the run's; `chunk` says which of them this chunk holds.
        grams: shared by the chunks of a stage.
        teacher_lens: None where no term needs the teacher.
    """

    def __init__(
        self,
        config: FddConfig,
        pairs: Sequence[LayerPair],
        chunk: ChunkPlan,
        shard: VocabShard,
        grams: StepGrams,
        teacher_lens: TeacherLens | None,
    ) -> None:
        self.config = config
        self.pairs = tuple(pairs)
        self.chunk = chunk
        self.parts = parts_of(config, pairs)
        self.needs = needs_of(config)
        self.settings = StepSettings()
        self._shard = shard
        self._grams = grams
        self._teacher_lens = teacher_lens
        self._tap_terms = tap_terms(config)
        self._reads_own_lse = any(not term.reach and ask_needs(term, config).lse for term in self._tap_terms)
        self._knows_all = knows_all_gradients(self._tap_terms, config)
        self._inner_divergence = (
            self._divergence(config.trajectory_divergence) if self.needs.divergence else None
        )
        self._parts = {part.name: part for part in self.parts}

    def begin_step(self, settings: StepSettings) -> None:
        """Start an optimizer (or evaluation) step."""
        self.settings = settings
        self._grams.begin_step()

    def weight_of(self, part: Part) -> float:
        """Return the factor of a part's token mean in the reported total."""
        inner = self.settings.inner if part.pair is not None else 1.0
        return part.term.weight(self.config) * inner / part.count

    def measured(self, name: str, value: float) -> float | None:
        """Return what a step saw of a reported mean: with one tap a step, that tap's own value, or None.

        Args:
            name: of a part or of anything else that is reported.
            value: the mean as reported, in which a tap counts for those that were not looked at.
        """
        draw, part = self.settings.draw, self._parts.get(name)
        if draw.tap is None or part is None or part.pair is None:
            return value
        return value / draw.factor if part.pair == self.pairs[draw.tap] else None

    def unseen(self, label_tokens: float, term_tokens: float) -> set[str]:
        """Return the names of reported means that are over no token in a step with these counts."""
        tokens = {
            part.name: label_tokens if part.term.tokens == "labels" else term_tokens for part in self.parts
        }
        names = {each for part in self.parts if not tokens[part.name] for each in (part.name, part.term.kind)}
        return names if label_tokens or term_tokens else names | {"total"}

    def packed_sums(self, loss: ChunkLoss, weights: TokenWeights) -> Tensor:
        """Pack counts and unweighted sums, float32 [len(COUNTS) + len(parts)]; 0 for other chunks' parts.

        Tokens are counted by the last chunk only.
        """
        counts = [weights.label_N.sum(), weights.term_N.sum()]
        if not self.chunk.is_last:
            counts = [torch.zeros_like(count) for count in counts]
        zero = torch.zeros_like(counts[0])
        return torch.stack(counts + [loss.sums.get(part.name, zero) for part in self.parts])

    def final(
        self,
        final_SBD: Tensor,
        lens: Lens,
        teacher: TeacherFeatures | None,
        labels_N: Tensor,
        weights: TokenWeights,
        loss_scale: Tensor | None = None,
    ) -> ChunkLoss:
        """Compute the terms of the final logits, on the last chunk, in one pass over the head.

        Args:
            final_SBD: hidden states after the final norm.
            lens: the student's live head, which these terms train; its norm is not used.
            labels_N: vocabulary ids of this rank's rows, negative where there is none.
            loss_scale: what the total will be multiplied with in the backward pass, where that is known.

        Collectives over the tensor-parallel group: those of `head_loss` once.
        """
        config = self.config
        if not uses_final_head(config):
            return ChunkLoss()
        divergence = teacher_NT = None
        if config.kd_weight > 0:
            assert teacher is not None
            assert teacher.final_SBT is not None
            divergence = self._divergence(config.kd_divergence)
            teacher_NT = teacher.final_SBT.flatten(0, 1)
        loss_weights = LossWeights(
            weights.term_N,
            weights.label_N,
            divergence=self._factor(LogitKD.kind),
            entropy=self._factor(CrossEntropy.kind),
            factor=loss_scale,
        )
        found = head_loss(
            teacher_NT,
            final_SBD.flatten(0, 1),
            self._heads(lens),
            divergence=divergence,
            labels_N=labels_N,
            weights=loss_weights,
        )
        assert found.cross_entropy is not None
        sums = {CrossEntropy.kind: found.cross_entropy}
        if found.divergence is not None:
            sums[LogitKD.kind] = found.divergence
        return ChunkLoss((found.loss,), sums)

    def inner(
        self,
        taps_SBD: Sequence[Tensor],
        carry: Carry | None,
        lens: Lens,
        teacher: TeacherFeatures,
        sample: RowSample,
        modules: TapModules = NO_MODULES,
    ) -> tuple[ChunkLoss, Carry | None]:
        """Compute the terms of this chunk's sampled layers, and the carry that the next chunk needs.

        Args:
            taps_SBD: outputs of the sampled blocks, before the norm, in depth order.
            carry: from the chunk before, as the plan says.
            lens: the student's, detached or live.
            sample: which token rows count, and how much (`StepDraw.rows`).
            modules: what the terms have for the taps of this chunk (`make_modules`).

        Collectives over the tensor-parallel group: those of `measure` once per tap that the step looks at and of each
        term's `compute` once per tap; where a term needs Gram matrices, those of `StepGrams.current`. Taps whose
        gradient is computed at once: those of `inner_pass`, once, in place of these.
        """
        chunk, draw = self.chunk, self.settings.draw
        assert len(taps_SBD) == len(chunk.pairs), "a tap was lost"
        heads = self._heads(lens)
        previous = None
        if carry is not None and draw.counts(chunk.pairs[0]):
            assert chunk.carry_in is not None
            features = self._features(chunk.carry_in, carry.hidden_SBD, lens, teacher, sample)
            statistics = sample.gather(carry.statistics)
            previous = Tap(self.pairs[chunk.carry_in], features, statistics=statistics)
        at_once = self._taps_at_once(heads)
        windows: dict[int, TapWindow] = {}
        for index, hidden_SBD in zip(chunk.pairs, taps_SBD, strict=True):
            if draw.looks_at(index):
                features = self._features(index, hidden_SBD, lens, teacher, sample)
                if index in at_once:
                    tap = Tap(self.pairs[index], features)
                else:
                    tap = self._tap(index, features, heads, sample.weights)
                windows[index] = TapWindow(tap, previous)
                previous = replace(tap, divergence=None)  # a tap that another stage sent has none
        context = TapContext(self.config, heads, sample.weights, lambda: self._grams.current(heads))
        totals = {
            f"{term.kind} {window.current.pair.name}": computed(
                term, window, replace(context, module=modules.get((term.kind, index)))
            )
            for term in self._tap_terms
            for index, window in windows.items()
            if draw.counts(index) and (window.previous is not None or not term.reach)
            if not at_once or not is_in_pass(term, window.current)
        }
        loss = self._weighted(totals)
        if at_once:
            loss += inner_pass(windows, self._factor_at, context, self._inner_divergence)
        if chunk.carry_out is None:
            return loss, None
        last = windows.get(chunk.pairs[-1])
        sent = sample.scatter(None if last is None else last.current.statistics) if self.needs.lse else None
        return loss, Carry(taps_SBD[-1], sent)

    def _taps_at_once(self, heads: Heads) -> set[int]:
        """Choose the taps whose gradient is computed with their statistics. What comes back for a carry isn't known."""
        draw = self.settings.draw
        if not (self._knows_all and draw.compares and is_worth_it(heads, self._inner_divergence)):
            return set()
        return {index for index in self.chunk.pairs if draw.looks_at(index) and index != self.chunk.carry_out}

    def _tap(self, index: int, features: Features, heads: Heads, weights: TokenWeights) -> Tap:
        draw, wanted = self.settings.draw, None
        if draw.counts(index):
            wanted = self._inner_divergence
        # A term that compares taps needs it of both; another one of its own tap, whatever is drawn.
        with_lse = (self.needs.lse and draw.compares) or (self._reads_own_lse and draw.counts(index))
        divergence, statistics = measure(features, heads, wanted, weights, with_lse=with_lse)
        return Tap(self.pairs[index], features, divergence, statistics)

    def _features(
        self, index: int, hidden_SBD: Tensor, lens: Lens, teacher: TeacherFeatures, sample: RowSample
    ) -> Features:
        assert self._teacher_lens is not None
        teacher_hidden, student_hidden = sample.hidden(teacher.taps_SBT[index]), sample.hidden(hidden_SBD)
        return Features(
            teacher_hidden.flatten(0, 1),
            student_hidden.flatten(0, 1),
            self._teacher_lens.features(teacher_hidden, self.pairs[index].teacher_block),
            lens.features(student_hidden),
        )

    def _weighted(self, totals: Mapping[str, Tensor]) -> ChunkLoss:
        """Weigh sums that carry gradient."""
        assert totals.keys() <= self._parts.keys(), f"{sorted(totals)} in a run of {sorted(self._parts)}"
        parts = tuple(self._factor(name) * total for name, total in totals.items())
        return ChunkLoss(parts, {name: total.detach() for name, total in totals.items()})

    def _factor(self, name: str) -> float:
        """Return the factor of a part's sum in the back-propagated loss; 0 for a part that the run lacks."""
        part = self._parts.get(name)
        if part is None:
            return 0.0
        per_token = self.settings.term_per_label_token if part.term.tokens == "labels" else 1.0
        return self.weight_of(part) * per_token

    def _factor_at(self, kind: str, index: int) -> float | None:
        """Return the factor of an inner term at a tap; None where the step does not compute it."""
        name = f"{kind} {self.pairs[index].name}"
        return self._factor(name) if name in self._parts and self.settings.draw.counts(index) else None

    def _heads(self, student: Lens) -> Heads:
        implementation = Implementation(self.config.kernels, skip_below=self.config.skip_below)
        heads = Heads(None, student.head_WH, self._shard, implementation, student_extras=student.extras)
        teacher = self._teacher_lens
        if teacher is None:
            return heads
        return replace(heads, teacher_WT=teacher.head_WT, teacher_extras=teacher.bare.extras)

    def _divergence(self, kind: str) -> Divergence:
        return Divergence(kind, self.config.divergence_mix, self.config.temperature)
