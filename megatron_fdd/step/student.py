"""The student's forward step: the run of a stock GPTModel that gives taps and losses.

Shape letters: B micro-batch, S sequence, N token rows of this rank in sequence-major order, D the student's
hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_fdd.data.batch import Batch, get_batch
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses import carry
from megatron_fdd.losses.carry import Carry
from megatron_fdd.losses.chunk_loss import ChunkLoss, StepSettings
from megatron_fdd.losses.objective import Objective
from megatron_fdd.losses.tap import TokenWeights
from megatron_fdd.losses.term_modules import NO_MODULES
from megatron_fdd.losses.terms import uses_final_head
from megatron_fdd.step.injection import attach_loss
from megatron_fdd.step.lens import StudentLens, read_lens
from megatron_fdd.step.lessons import NO_LABEL, Course, Dealing, Lesson, share_of
from megatron_fdd.step.taps import forward_with_taps, hidden_and_taps
from megatron_fdd.step.term_modules import TermModules

FirstBatchCheck = Callable[[Sequence[Lesson]], bool]


class StudentForward:
    """Megatron's `forward_step_func`, which runs one micro-batch through the teacher and one chunk of the student.

    Args:
        chunks: this rank's chunks, by virtual stage.
        lens: the student's lens on this stage, which the chunks share.
        teachers: names of several teachers; the only one's is empty.
    """

    def __init__(
        self, chunks: Sequence[ChunkForward], lens: StudentLens, teachers: Sequence[str] = ("",)
    ) -> None:
        self.chunks, self.teachers = list(chunks), teachers
        self._lens = lens

    @property
    def objectives(self) -> Sequence[Objective]:
        """Each teacher's, of any chunk: names and weights of the terms are the same for all chunks."""
        return [course.objective for course in self.chunks[-1].courses]

    def begin_step(self, settings: StepSettings) -> None:
        """Forget the last step, and bring the student's lens to where it is used.

        Collectives: those of `StudentLens.begin_step`.
        """
        self._lens.begin_step()
        for chunk in self.chunks:
            chunk.begin_step(settings)

    def take_sums(self) -> Tensor:
        """Return this rank's packed sums (`Objective.packed_sums`) over the step's micro-batches and chunks."""
        return torch.stack([chunk.take_sums() for chunk in self.chunks]).sum(0)

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        """Return the loss (a sum over tokens) or the chunk's output, and the function that Megatron calls with it."""
        return self.chunks[unwrap_model(model).vp_stage or 0](data_iterator, model)


class ChunkForward:
    """The run of one micro-batch through one chunk.

    Args:
        courses: one for each teacher, in the order of their numbers; one without a teacher too.
        lens: the student's lens on this stage.
        modules: what terms learn or keep for the chunk's taps.
        has_one_width: whether every boundary has room for a carry (`Plan.has_one_width`).
        first_batch_check: called where the teachers' final hidden states are, with the lessons of the first micro-batch
            of each step, until it returns that it is done.
    """

    def __init__(
        self,
        courses: Sequence[Course],
        lens: StudentLens,
        topology: Topology,
        *,
        modules: TermModules | None = None,
        has_one_width: bool = False,
        first_batch_check: FirstBatchCheck | None = None,
    ) -> None:
        self.courses = list(courses)
        # Chunks and needs are the same for all teachers.
        self.objective = objective = courses[0].objective
        self._lens = lens
        self._topology = topology
        self._modules = modules
        self._has_one_width = has_one_width
        self._first_batch_check = first_batch_check
        self._layers = {objective.pairs[index].student_layer for index in objective.chunk.pairs}
        self._num_started = 0
        self._sums: Tensor | None = None

    def begin_step(self, settings: StepSettings) -> None:
        """Forget the last step."""
        for course in self.courses:
            course.objective.begin_step(settings)
        self._num_started, self._sums = 0, None

    def take_sums(self) -> Tensor:
        """Return this chunk's packed sums over the step's micro-batches."""
        assert self._sums is not None
        return self._sums

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        """Run a micro-batch; return what `StudentForward.__call__` returns."""
        batch = get_batch(data_iterator, torch.cuda.current_device(), self._topology.context_group)
        self._num_started += 1
        student = unwrap_model(model)
        carried = self._split_input(student, batch)
        lessons, dealing = self._lessons(batch)
        processor = partial(self._loss, student, lessons, dealing, carried)
        output, taps_SBD = forward_with_taps(model, batch, self._layers, processor)
        if not self.objective.chunk.is_last:
            output = self._stage_output(student, lessons, dealing, carried, output, taps_SBD)
        return output, partial(_loss_function, num_tokens=self._term_mask(batch).sum().to(torch.int))

    def _split_input(self, student: GPTModel, batch: Batch) -> Carry | None:
        """Split off the carry behind the hidden states, so that the decoder sees only these."""
        chunk, received = self.objective.chunk, student.decoder.input_tensor
        if chunk.is_first or (chunk.carry_in is None and not self._has_one_width):
            return None
        sequence = batch.tokens_BS.shape[1]
        if self._topology.sequence_parallel:
            sequence //= self._topology.tensor_size
        if chunk.carry_in is None:
            student.decoder.input_tensor = received[:sequence]
            return None
        student.decoder.input_tensor, carried = carry.split(
            received, sequence, with_lse=self.objective.needs.lse
        )
        return carried

    def _lessons(self, batch: Batch) -> tuple[list[Lesson], Dealing]:
        """Deal a micro-batch's rows among the teachers that are in it, and ask them. Collectives: the teachers' own."""
        shares = {number: share_of(batch, number, self._topology) for number in range(len(self.courses))}
        shares = {number: share for number, share in shares.items() if share.samples}
        weights, labels_N = self.token_weights(batch), self.label_rows(batch)
        dealing = Dealing(list(shares.values()), labels_N.device)
        dealt = zip(shares, dealing.weights(weights), dealing.rows(labels_N, filler=NO_LABEL), strict=True)
        lessons = []
        for number, own_weights, own_labels_N in dealt:
            course = self.courses[number]
            features = None
            if course.teacher is not None:
                features = course.teacher.features(self._num_started - 1, batch)
            lessons.append(Lesson(number, course.objective, features, own_weights, own_labels_N))
        check = self._first_batch_check
        if check is not None and self._num_started == 1 and check(lessons):
            self._first_batch_check = None
        return lessons, dealing

    def _loss(
        self,
        student: GPTModel,
        lessons: Sequence[Lesson],
        dealing: Dealing,
        carried: Carry | None,
        *,
        hidden_states: Tensor | tuple[Tensor, list[Tensor]],
        **_: object,
    ) -> Tensor:
        """Return the loss in place of logits, as GPTModel's `output_processor` on the last stage."""
        final_SBD, taps_SBD = hidden_and_taps(hidden_states)
        lens = read_lens(student, with_norm=False, detached=False)
        scale = _loss_scale(student)
        losses = [
            lesson.objective.final(own_SBD, lens, lesson.features, lesson.labels_N, lesson.weights, scale)
            for lesson, own_SBD in zip(lessons, dealing.hidden(final_SBD), strict=True)
        ]
        inner = self._inner_loss(student, taps_SBD, lessons, dealing, carried)[0]
        losses = [loss + more for loss, more in zip(losses, inner, strict=True)]
        self._add_sums(lessons, losses)
        # If all weights are 0, the stage's input would have no gradient, and the schedule would hang.
        anchor = final_SBD.flatten()[0].float() * 0.0
        if not uses_final_head(self.objective.config):
            # Megatron's overlapped reduction waits in every step for a gradient of every parameter.
            anchor = anchor + lens.head_WH.flatten()[0].float() * 0.0
        total = sum(losses, ChunkLoss()).total
        return anchor if total is None else total + anchor

    def _stage_output(
        self,
        student: GPTModel,
        lessons: Sequence[Lesson],
        dealing: Dealing,
        carried: Carry | None,
        hidden_SBD: Tensor,
        taps_SBD: Sequence[Tensor],
    ) -> Tensor:
        """Return the hidden states for the next stage, with this stage's loss attached and the carry behind them."""
        chunk = self.objective.chunk
        losses, passed_on = self._inner_loss(student, taps_SBD, lessons, dealing, carried)
        self._add_sums(lessons, losses)
        total = sum(losses, ChunkLoss()).total
        if total is not None and total.requires_grad:
            hidden_SBD = attach_loss(hidden_SBD, total, _loss_scale(student))
        if chunk.carry_out is not None:
            assert passed_on is not None
            return carry.append(hidden_SBD, passed_on)
        if self._has_one_width:
            sequence, micro_batch, width = hidden_SBD.shape
            rows = carry.carried_rows(
                sequence, micro_batch, width, hidden_SBD.dtype, with_lse=self.objective.needs.lse
            )
            return carry.append_nothing(hidden_SBD, rows)
        return hidden_SBD

    def _inner_loss(
        self,
        student: GPTModel,
        taps_SBD: Sequence[Tensor],
        lessons: Sequence[Lesson],
        dealing: Dealing,
        carried: Carry | None,
    ) -> tuple[list[ChunkLoss], Carry | None]:
        """Return each lesson's loss of this chunk's taps, and what goes on behind it: without taps, `carried`."""
        if not self.objective.chunk.pairs:
            return [ChunkLoss() for _ in lessons], carried
        lens = self._lens.for_micro_batch(student)
        modules = self._modules.for_micro_batch() if self._modules else NO_MODULES
        own_taps = zip(*(dealing.hidden(tap_SBD) for tap_SBD in taps_SBD), strict=True)
        losses, sent = [], []
        for lesson, taps, own_carry in zip(lessons, own_taps, dealing.carries(carried), strict=True):
            assert lesson.features is not None
            # A draw depends on the number of the micro-batch, counted from 1.
            sample = lesson.objective.settings.draw.rows(lesson.weights, self._num_started)
            loss, passed_on = lesson.objective.inner(taps, own_carry, lens, lesson.features, sample, modules)
            losses.append(loss)
            sent.append(passed_on)
        if self._modules:
            losses[0] += ChunkLoss(self._modules.anchors())
        return losses, dealing.joined(sent, taps_SBD[-1])

    def _add_sums(self, lessons: Sequence[Lesson], losses: Sequence[ChunkLoss]) -> None:
        """Add this micro-batch's sums, teacher by teacher; 0 for a teacher that is not in it."""
        taught = {
            lesson.number: lesson.objective.packed_sums(loss, lesson.weights)
            for lesson, loss in zip(lessons, losses, strict=True)
        }
        nothing = torch.zeros_like(next(iter(taught.values())))
        sums = torch.cat([taught.get(number, nothing) for number in range(len(self.courses))])
        self._sums = sums if self._sums is None else self._sums + sums

    def token_weights(self, batch: Batch) -> TokenWeights:
        """Return the weights of this rank's rows, for the cross-entropy and for the other terms."""
        masks_BS = batch.loss_mask_BS, self._term_mask(batch)
        return TokenWeights(*(self.rows(mask_BS).float() for mask_BS in masks_BS))

    def _term_mask(self, batch: Batch) -> Tensor:
        """Return the mask of the tokens that all terms but the cross-entropy use."""
        return batch.loss_mask_BS if self.objective.config.tokens == "labels" else batch.token_mask_BS

    def label_rows(self, batch: Batch) -> Tensor:
        """Return the labels of this rank's rows; `NO_LABEL` where there is none."""
        return self.rows(torch.where(batch.loss_mask_BS > 0, batch.labels_BS, NO_LABEL))

    def rows(self, value_BS: Tensor) -> Tensor:
        """Return this rank's rows, [B, S] -> [N], in the order of Megatron's hidden states.

        Hidden states are [S, B, D], cut along S under sequence parallelism.
        """
        value_SB = value_BS.transpose(0, 1)
        if self._topology.sequence_parallel:
            value_SB = value_SB.chunk(self._topology.tensor_size)[self._topology.tensor_rank]
        return value_SB.flatten()


def _loss_scale(student: GPTModel) -> Tensor:
    """Return the factor by which Megatron's schedule multiplies the last stage's loss before backward, 0-dim."""
    scale = torch.ones((), device=torch.cuda.current_device())
    grad_scale = student.config.grad_scale_func
    return scale if grad_scale is None else grad_scale(scale)


def _loss_function(loss: Tensor, *, num_tokens: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the loss for Megatron, which with `--calculate-per-token-loss` divides gradients by the step's tokens.

    Not by those with a label: the terms of a step without one are learned too.
    """
    return loss, num_tokens, {}
