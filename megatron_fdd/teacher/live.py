"""A teacher that runs beside the student, on the same ranks, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_fdd.teacher import TeacherFeatures


class LiveTeacher:
    """Runs a frozen GPTModel forward. Keeps nothing between micro-batches.

    Args:
        model: from `build_teacher`.
        layers: sampled layers, 0-based, in depth order.
    """

    def __init__(self, model: GPTModel, layers: Sequence[int]) -> None:
        self.model = model
        self._layers = set(layers)

    @torch.no_grad()
    def features(
        self, tokens_BS: Tensor, position_ids_BS: Tensor, attention_mask: Tensor | None
    ) -> TeacherFeatures:
        """Hidden states of one micro-batch. Collectives: those of the model's own forward pass."""
        output = self.model(
            tokens_BS,
            position_ids_BS,
            attention_mask,
            extra_block_kwargs={"extract_layer_indices": self._layers},
            output_processor=_hidden_states,
        )
        final_SBT, taps_SBT = output if self._layers else (output, ())
        return TeacherFeatures(final_SBT, tuple(taps_SBT))


def _hidden_states(*, hidden_states: Tensor, **_: object) -> Tensor:
    """Stop in front of the head: no logits of the teacher are ever formed."""
    return hidden_states
