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
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.losses.objective import ChunkLoss, Objective, StepSettings
from megatron_fdd.losses.tap import TokenWeights
from megatron_fdd.losses.terms import uses_final_head
from megatron_fdd.step.injection import attach_loss
from megatron_fdd.step.lens import StudentLens, read_head
from megatron_fdd.step.taps import forward_with_taps, hidden_and_taps
from megatron_fdd.step.teacher.teacher import Teacher
from megatron_fdd.step.term_modules import anchors, read_term_modules

FirstBatchCheck = Callable[[TeacherFeatures, Tensor], None]


class StudentForward:
    """Megatron's `forward_step_func`, which runs one micro-batch through the teacher and one chunk of the student.

    Args:
        chunks: this rank's chunks, by virtual stage.
        lens: the student's lens on this stage, which the chunks share.
    """

    def __init__(self, chunks: Sequence[ChunkForward], lens: StudentLens) -> None:
        self.chunks = list(chunks)
        self._lens = lens

    @property
    def objective(self) -> Objective:
        """The objective of any chunk: names and weights of the terms are the same for all."""
        return self.chunks[-1].objective

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
        teacher: None if no term needs it.
        lens: the student's lens on this stage.
        has_one_width: whether every boundary has room for a carry (`Plan.has_one_width`).
        first_batch_check: called once, where the teacher's final hidden states are, with the teacher's features and
            the labels of the first batch's rows.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: Teacher | None,
        lens: StudentLens,
        topology: Topology,
        *,
        has_one_width: bool = False,
        first_batch_check: FirstBatchCheck | None = None,
    ) -> None:
        self.objective = objective
        self._teacher = teacher
        self._lens = lens
        self._topology = topology
        self._has_one_width = has_one_width
        self._first_batch_check = first_batch_check
        self._layers = {objective.pairs[index].student_layer for index in objective.chunk.pairs}
        self._num_started = 0
        self._sums: Tensor | None = None

    def begin_step(self, settings: StepSettings) -> None:
        """Forget the last step."""
        self.objective.begin_step(settings)
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
        teacher = self._teacher_features(batch)
        processor = partial(self._loss, student, batch, teacher, carried)
        output, taps_SBD = forward_with_taps(model, batch, self._layers, processor)
        if not self.objective.chunk.is_last:
            output = self._stage_output(student, batch, teacher, carried, output, taps_SBD)
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

    def _teacher_features(self, batch: Batch) -> TeacherFeatures | None:
        if self._teacher is None:
            return None
        features = self._teacher.features(self._num_started - 1, batch)
        if self._first_batch_check is not None and features.final_SBT is not None:
            check, self._first_batch_check = self._first_batch_check, None
            check(features, self.label_rows(batch))
        return features

    def _loss(
        self,
        student: GPTModel,
        batch: Batch,
        teacher: TeacherFeatures | None,
        carried: Carry | None,
        *,
        hidden_states: Tensor | tuple[Tensor, list[Tensor]],
        **_: object,
    ) -> Tensor:
        """Return the loss in place of logits, as GPTModel's `output_processor` on the last stage."""
        objective = self.objective
        final_SBD, taps_SBD = hidden_and_taps(hidden_states)
        weights = self.token_weights(batch)
        labels_N, scale = self.label_rows(batch), _loss_scale(student)
        loss = objective.final(final_SBD, read_head(student), teacher, labels_N, weights, scale)
        loss += self._inner_loss(student, taps_SBD, teacher, carried, weights)[0]
        self._add_sums(loss, weights)
        # If all weights are 0, the stage's input would have no gradient, and the schedule would hang.
        anchor = final_SBD.flatten()[0].float() * 0.0
        if not uses_final_head(objective.config):
            # Megatron's overlapped reduction waits in every step for a gradient of every parameter.
            anchor = anchor + read_head(student).flatten()[0].float() * 0.0
        return anchor if loss.total is None else loss.total + anchor

    def _stage_output(
        self,
        student: GPTModel,
        batch: Batch,
        teacher: TeacherFeatures | None,
        carried: Carry | None,
        hidden_SBD: Tensor,
        taps_SBD: Sequence[Tensor],
    ) -> Tensor:
        """Return the hidden states for the next stage, with this stage's loss attached and the carry behind them."""
        chunk = self.objective.chunk
        weights = self.token_weights(batch)
        loss, passed_on = ChunkLoss(), carried
        if chunk.pairs:
            loss, passed_on = self._inner_loss(student, taps_SBD, teacher, carried, weights)
        self._add_sums(loss, weights)
        if loss.total is not None and loss.total.requires_grad:
            hidden_SBD = attach_loss(hidden_SBD, loss.total, _loss_scale(student))
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
        teacher: TeacherFeatures | None,
        carried: Carry | None,
        weights: TokenWeights,
    ) -> tuple[ChunkLoss, Carry | None]:
        if not self.objective.chunk.pairs:
            return ChunkLoss(), None
        assert teacher is not None
        # A draw depends on the number of the micro-batch, counted from 1.
        sample = self.objective.settings.draw.rows(weights, self._num_started)
        modules = read_term_modules(student)
        loss, passed_on = self.objective.inner(
            taps_SBD, carried, self._lens.for_micro_batch(student), teacher, sample, modules
        )
        return loss + ChunkLoss(anchors(modules)), passed_on

    def _add_sums(self, loss: ChunkLoss, weights: TokenWeights) -> None:
        sums = self.objective.packed_sums(loss, weights)
        self._sums = sums if self._sums is None else self._sums + sums

    def token_weights(self, batch: Batch) -> TokenWeights:
        """Return the weights of this rank's rows, for the cross-entropy and for the other terms."""
        masks_BS = batch.loss_mask_BS, self._term_mask(batch)
        return TokenWeights(*(self.rows(mask_BS).float() for mask_BS in masks_BS))

    def _term_mask(self, batch: Batch) -> Tensor:
        """Return the mask of the tokens that all terms but the cross-entropy use."""
        return batch.loss_mask_BS if self.objective.config.tokens == "labels" else batch.token_mask_BS

    def label_rows(self, batch: Batch) -> Tensor:
        """Return the labels of this rank's rows; -100 where there is none."""
        return self.rows(torch.where(batch.loss_mask_BS > 0, batch.labels_BS, -100))

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
