"""The student's forward step: a stock GPTModel, driven so that taps and losses come out of it.

Shape letters: B micro-batch, S sequence, N token rows of this rank in sequence-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_fdd.data.batch import Batch, get_batch
from megatron_fdd.lens import read_head, read_lens
from megatron_fdd.losses import TokenWeights
from megatron_fdd.objective import Objective, StudentState
from megatron_fdd.teacher import TeacherFeatures
from megatron_fdd.teacher.live import LiveTeacher
from megatron_fdd.topology import Topology

PACKED_KEY = "fdd"  # the schedule wrapper unpacks it; Megatron's own code never sees it


class StudentStep:
    """Megatron's `forward_step_func`: one micro-batch through teacher and student."""

    def __init__(self, objective: Objective, teacher: LiveTeacher | None, topology: Topology) -> None:
        self._objective = objective
        self._teacher = teacher
        self._topology = topology
        self._layers = {pair.student_layer for pair in objective.pairs}
        # Called once, with the features and the labels of the rows of the first batch.
        self.first_batch_check: Callable[[TeacherFeatures, Tensor], None] | None = None

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        """Returns the loss (a sum over tokens) and what Megatron's schedule calls with it."""
        batch = get_batch(data_iterator, torch.cuda.current_device())
        teacher = self._teacher_features(batch)
        packed: list[Tensor] = []
        loss = model(
            batch.tokens_BS,
            batch.position_ids_BS,
            batch.attention_mask,
            extra_block_kwargs={"extract_layer_indices": self._layers},
            output_processor=partial(self._losses, unwrap_model(model), batch, teacher, packed),
        )
        return loss, partial(_report, num_tokens=batch.loss_mask_BS.sum().to(torch.int), packed=packed)

    def _teacher_features(self, batch: Batch) -> TeacherFeatures | None:
        if self._teacher is None:
            return None
        features = self._teacher.features(batch.tokens_BS, batch.position_ids_BS, batch.attention_mask)
        if self.first_batch_check is not None:
            check, self.first_batch_check = self.first_batch_check, None
            check(features, self.label_rows(batch))
        return features

    def _losses(
        self,
        student: GPTModel,
        batch: Batch,
        teacher: TeacherFeatures | None,
        packed: list[Tensor],
        *,
        hidden_states: Tensor | tuple[Tensor, list[Tensor]],
        **_: object,
    ) -> Tensor:
        """GPTModel's `output_processor`: the loss in place of logits."""
        final_SBS, taps_SBS = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, [])
        config = self._objective.config
        lens = read_lens(
            student, with_norm=config.lens_norm == "final", detached=config.lens_head == "detached"
        )
        state = StudentState(final_SBS, taps_SBS, read_head(student), lens)
        weights = self.token_weights(batch)
        total, sums = self._objective(state, teacher, self.label_rows(batch), weights)
        packed.append(sums)
        return total

    def token_weights(self, batch: Batch) -> TokenWeights:
        """Which of this rank's rows count, for the cross-entropy and for the other terms."""
        label_N = self.rows(batch.loss_mask_BS).float()
        if self._objective.config.tokens == "labels":
            return TokenWeights(label_N, label_N)
        return TokenWeights(label_N, self.rows(batch.token_mask_BS).float())

    def label_rows(self, batch: Batch) -> Tensor:
        """Labels of this rank's rows; -100 where there is none."""
        return self.rows(torch.where(batch.loss_mask_BS > 0, batch.labels_BS, -100))

    def rows(self, value_BS: Tensor) -> Tensor:
        """[B, S] -> [N] of this rank: Megatron's hidden states are [S, B, H], cut along S when sequence parallel."""
        value_SB = value_BS.transpose(0, 1)
        if self._topology.sequence_parallel:
            value_SB = value_SB.chunk(self._topology.tensor_size)[self._topology.tensor_rank]
        return value_SB.flatten()


def _report(
    loss: Tensor, *, num_tokens: Tensor, packed: list[Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's loss function: with `--calculate-per-token-loss` gradients are divided by the step's tokens."""
    return loss, num_tokens, {PACKED_KEY: packed[0]}
