"""What a pipeline of several stages adds to a step: the teacher first, lens copies, and wider sends.

Nothing of it runs with one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.carry import carried_rows
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.lens import Lens
from megatron_fdd.losses.objective import Objective
from megatron_fdd.step.lens import read_lens
from megatron_fdd.step.lens_copies import LensCopies, empty_lens
from megatron_fdd.step.teacher.pipelined import PipelinedTeacher
from megatron_fdd.step.trained_lens import TrainedLens

BoundaryShape = tuple[int, int, int]


class PipelineWork:
    """Prepares one step on this rank's stage, and tells Megatron's schedule the shapes that are sent.

    Args:
        students: this stage's unwrapped chunks, by virtual stage.
        objectives: one for each.
    """

    def __init__(
        self, students: Sequence[GPTModel], objectives: Sequence[Objective], plan: Plan, topology: Topology
    ) -> None:
        self._student = students[-1]
        self._objectives = list(objectives)
        self._plan = plan
        self._topology = topology
        self._copies = LensCopies(plan.tapping_stages, topology.pipeline_group)
        self._teacher: PipelinedTeacher | None = None
        self._live: TrainedLens | None = None
        if plan.config.lens_head == "live" and plan.copying_stages:
            with_norm = plan.config.lens_norm == "final"
            self._live = TrainedLens(plan.copying_stages, topology, with_norm=with_norm)
            # The official place for what comes after Megatron's own reduction; the training loop keeps it.
            config = students[0].config
            config.finalize_model_grads_func = partial(
                _finalize, config.finalize_model_grads_func or finalize_model_grads, self._live, students
            )

    def add_teacher(self, teacher: PipelinedTeacher) -> None:
        """Run this teacher before the student, and bring its lens to the stages that tap.

        Collectives over the pipeline group: one send for each tensor of the lens to each stage that taps.
        """
        self._teacher = teacher
        copies = LensCopies(self._plan.tapping_stages, self._topology.pipeline_group)
        lens = copies.refresh(self._own_lens(teacher.model), partial(self._empty_lens, teacher.model))
        for objective in self._objectives:
            objective.teacher_lens = lens

    def prepare(
        self, batches: Sequence[Mapping[str, Tensor]], seq_length: int, micro_batch_size: int
    ) -> Lens | None:
        """Run the teacher on all micro-batches and bring the student's lens to the stages that tap.

        Returns: the student's lens for this stage, None on one without a tap.
        Collectives over the pipeline group: those of `PipelinedTeacher.run` and `LensCopies.refresh`.
        """
        if self._teacher is not None:
            self._teacher.run(batches, seq_length, micro_batch_size)
        if not self._plan.pairs:
            return None
        with torch.no_grad():
            lens = self._copies.refresh(
                self._own_lens(self._student), partial(self._empty_lens, self._student)
            )
        if self._live is None or lens is None or self._topology.stage not in self._plan.copying_stages:
            return lens
        return self._live.open(lens)

    def schedule_keywords(self, seq_length: int) -> dict[str, Any]:
        """Keywords for Megatron's schedule: how much wider than hidden states a boundary is on dim 0.

        1F1B asks a function for each boundary's shape. Interleaved schedules know one shape, which they take
        from `seq_length`; each chunk reads its true length from its batch.
        """
        if len(self._objectives) == 1:
            return {"adjust_tensor_shapes_fn": self._adjust_shapes}
        if not self._plan.has_one_width:
            return {}
        parts = self._topology.sequence_parts
        sequence, _, _ = self._wider((seq_length // parts, 1, self._student.config.hidden_size))
        return {"seq_length": sequence * parts}

    def _adjust_shapes(
        self, received: list[BoundaryShape], sent: list[BoundaryShape]
    ) -> tuple[list[BoundaryShape], list[BoundaryShape]]:
        """Megatron's `adjust_tensor_shapes_fn`."""
        (objective,) = self._objectives
        chunk = objective.chunk
        return (
            received if chunk.carry_in is None else [self._wider(shape) for shape in received],
            sent if chunk.carry_out is None else [self._wider(shape) for shape in sent],
        )

    def _wider(self, shape: BoundaryShape) -> BoundaryShape:
        sequence, micro_batch, width = shape
        dtype = self._student.config.pipeline_dtype
        with_lse = self._objectives[0].carries_lse
        extra = carried_rows(sequence, micro_batch, width, dtype, with_lse=with_lse)
        return (sequence + extra, micro_batch, width)

    def _own_lens(self, model: GPTModel) -> Lens | None:
        """The model's lens as it is now, on the stage that owns it."""
        if not self._topology.is_last_stage:
            return None
        return read_lens(model, with_norm=self._plan.config.lens_norm == "final", detached=True)

    def _empty_lens(self, model: GPTModel) -> Lens:
        rows = self._plan.padded_vocab_size // self._topology.tensor_size
        return empty_lens(model.config, rows, with_norm=self._plan.config.lens_norm == "final")


def _finalize(
    finalize: Callable[..., None],
    live: TrainedLens,
    students: Sequence[GPTModel],
    model: list[torch.nn.Module],
    num_tokens: Tensor | None = None,
    **keywords: Any,
) -> None:
    """Megatron's `finalize_model_grads`, then the lens gradients of other stages."""
    finalize(model, num_tokens, **keywords)
    assert num_tokens is not None, "--calculate-per-token-loss is forced"
    live.send_home(students[-1] if students[-1].post_process else students[0], num_tokens)
