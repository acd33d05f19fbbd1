"""The teacher without a pipeline: it runs beside the student on the same ranks, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel

from megatron_fdd.data.batch import Batch
from megatron_fdd.data.store.identity import TapForm
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.step.taps import forward_with_taps, stop_before_head
from megatron_fdd.step.teacher.tap_format import TapFormat


class BesideTeacher:
    """A frozen GPTModel that runs forward and keeps nothing between micro-batches.

    Args:
        model: from `build_teacher`.
        layers: the sampled layer of each pair, 0-based, in depth order.
        form: how taps are rounded although none is kept, so that all layouts train on the same numbers.
    """

    def __init__(self, model: GPTModel, layers: Sequence[int], *, form: TapForm = "bf16") -> None:
        self.model = model
        self._layers = list(layers)
        tap_format = TapFormat(model.config.params_dtype, form)
        self._rounding = None if tap_format.is_identity else tap_format
        self._width = model.config.hidden_size

    @torch.no_grad()
    def features(self, _index: int, batch: Batch) -> TeacherFeatures:
        """Return the hidden states of one micro-batch. Collectives: those of the model's own forward pass."""
        final_SBT, taps_SBT = forward_with_taps(self.model, batch, self._layers, stop_before_head)
        rounding = self._rounding
        if rounding is not None:
            taps_SBT = [rounding.unpack(rounding.pack(tap_SBT), self._width) for tap_SBT in taps_SBT]
        return TeacherFeatures(final_SBT, dict(enumerate(taps_SBT)))
