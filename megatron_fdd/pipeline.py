"""What a pipeline of several stages adds to a step: the teacher first, lens copies, and wider sends.

Nothing of it runs with one stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_fdd.carry import carried_rows
from megatron_fdd.layer_plan import ChunkPlan
from megatron_fdd.lens import Lens, read_lens
from megatron_fdd.lens_copies import LensCopies, empty_lens
from megatron_fdd.objective import Objective
from megatron_fdd.teacher.pipelined import PipelinedTeacher
from megatron_fdd.topology import Topology

Shape = tuple[int, int, int]


class PipelineSteps:
    """Prepares one step on this rank's stage, and knows the shapes that its neighbours send.

    Args:
        student: this stage's unwrapped GPTModel.
        head_rows: rows of this rank's head shards, padding included.
        chunks: the student's plan, by stage.
    """

    def __init__(
        self,
        student: GPTModel,
        head_rows: int,
        objective: Objective,
        chunks: Sequence[ChunkPlan],
        topology: Topology,
    ) -> None:
        self._student = student
        self._head_rows = head_rows
        self._objective = objective
        self._topology = topology
        self._tapping = [stage for stage, chunk in enumerate(chunks) if chunk.pairs]
        self._copies = LensCopies(self._tapping, topology.pipeline_group)
        self._teacher: PipelinedTeacher | None = None

    def add_teacher(self, teacher: PipelinedTeacher) -> None:
        """Run this teacher before the student, and bring its lens to the stages that tap.

        Collectives over the pipeline group: one send for each tensor of the lens to each stage that taps.
        """
        self._teacher = teacher
        copies = LensCopies(self._tapping, self._topology.pipeline_group)
        self._objective.teacher_lens = copies.refresh(*self._own_and_empty_lens(teacher.model))

    def prepare(
        self, batches: Sequence[Mapping[str, Tensor]], seq_length: int, micro_batch_size: int
    ) -> Lens | None:
        """Run the teacher on all micro-batches and bring the student's lens to the stages that tap.

        Returns: the student's lens for this stage, None on one without a tap.
        Collectives over the pipeline group: those of `PipelinedTeacher.run` and `LensCopies.refresh`.
        """
        if self._teacher is not None:
            self._teacher.run(batches, seq_length, micro_batch_size)
        if not self._tapping:
            return None
        with torch.no_grad():
            return self._copies.refresh(*self._own_and_empty_lens(self._student))

    def adjust_shapes(self, received: list[Shape], sent: list[Shape]) -> tuple[list[Shape], list[Shape]]:
        """Megatron's `adjust_tensor_shapes_fn`: a boundary that carries features is wider on dim 0."""
        chunk = self._objective.chunk
        return (
            received if chunk.carry_in is None else [self._wider(shape) for shape in received],
            sent if chunk.carry_out is None else [self._wider(shape) for shape in sent],
        )

    def _wider(self, shape: Shape) -> Shape:
        sequence, micro_batch, width = shape
        dtype = self._student.config.pipeline_dtype
        extra = carried_rows(sequence, micro_batch, width, dtype, with_lse=self._objective.carries_lse)
        return (sequence + extra, micro_batch, width)

    def _own_and_empty_lens(self, model: GPTModel) -> tuple[Lens | None, Lens | None]:
        """On the owner, the model's lens now; elsewhere one to receive into."""
        with_norm = self._objective.config.lens_norm == "final"
        if self._topology.is_last_stage:
            return read_lens(model, with_norm=with_norm, detached=True), None
        return None, empty_lens(model.config, self._head_rows, with_norm=with_norm)
