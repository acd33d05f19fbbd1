"""The additions of a pipeline of several stages to a step: teacher first, wider sends, lens gradients sent home.

With one stage, nothing here runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_fdd.host.sends import let_host_run_ahead
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.carry import carried_rows
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.objective import Objective
from megatron_fdd.step.lens import StudentLens
from megatron_fdd.step.teacher.pipelined import PipelinedTeacher

BoundaryShape = tuple[int, int, int]


class PipelineWork:
    """The preparation of one step on this rank's stage, and the shapes that Megatron's schedule has to send.

    Args:
        students: this stage's unwrapped chunks, by virtual stage.
        objectives: one for each chunk.
        teacher: None if no term needs it.
    """

    def __init__(
        self,
        students: Sequence[GPTModel],
        objectives: Sequence[Objective],
        plan: Plan,
        topology: Topology,
        teacher: PipelinedTeacher | None,
    ) -> None:
        for student in students:
            let_host_run_ahead(student.config)
        self._config = students[-1].config
        self._objectives = list(objectives)
        self._plan = plan
        self._topology = topology
        self._teacher = teacher

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher runs here before the student's schedule."""
        return self._teacher is not None

    def prepare(
        self, batches: Sequence[Mapping[str, Tensor]], seq_length: int, micro_batch_size: int
    ) -> None:
        """Run the teacher on all micro-batches.

        Collectives over the pipeline group: those of `PipelinedTeacher.run`.
        """
        if self._teacher is not None:
            self._teacher.run(batches, seq_length, micro_batch_size)

    def schedule_keywords(self, seq_length: int) -> dict[str, Any]:
        """Return keywords that tell Megatron's schedule how much longer than hidden states a boundary is on dim 0.

        1F1B asks a function for each boundary's shape. Interleaved schedules know only one shape, which they
        derive from `seq_length`; each chunk reads its true length from its batch.
        """
        if len(self._objectives) == 1:
            return {"adjust_tensor_shapes_fn": self._adjust_shapes}
        if not self._plan.has_one_width:
            return {}
        parts = self._topology.sequence_parts
        sequence, _, _ = self._wider((seq_length // parts, 1, self._config.hidden_size))
        return {"seq_length": sequence * parts}

    def _adjust_shapes(
        self, received: list[BoundaryShape], sent: list[BoundaryShape]
    ) -> tuple[list[BoundaryShape], list[BoundaryShape]]:
        """Adjust the shapes of both boundaries, as Megatron's `adjust_tensor_shapes_fn`."""
        (objective,) = self._objectives
        chunk = objective.chunk
        return (
            received if chunk.carry_in is None else [self._wider(shape) for shape in received],
            sent if chunk.carry_out is None else [self._wider(shape) for shape in sent],
        )

    def _wider(self, shape: BoundaryShape) -> BoundaryShape:
        sequence, micro_batch, width = shape
        dtype = self._config.pipeline_dtype
        with_lse = self._objectives[0].needs.lse
        extra = carried_rows(sequence, micro_batch, width, dtype, with_lse=with_lse)
        return (sequence + extra, micro_batch, width)


def finalize_with_lens(config: TransformerConfig, lens: StudentLens) -> None:
    """Make the lens gradients of other stages go to the last stage after Megatron's own reduction of gradients.

    Megatron's training loop keeps a `finalize_model_grads_func` that is set already: this is the official place.
    """
    own = config.finalize_model_grads_func or finalize_model_grads

    def finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **keywords: Any) -> None:
        own(model, num_tokens, **keywords)
        assert num_tokens is not None, "--calculate-per-token-loss is forced"
        lens.send_gradients_home(num_tokens)

    config.finalize_model_grads_func = finalize
