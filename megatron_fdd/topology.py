"""The process groups of a run, read once from Megatron and handed around."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Topology:
    """Where this rank stands. Nothing else in the package reads `parallel_state`.

    Attributes:
        tensor_group: ranks that share a model replica by tensor parallelism.
        context_group: ranks that share a sequence by context parallelism.
        rows_group: ranks whose token rows differ: data and context parallel, and tensor parallel too when
            sequence parallel.
        sequence_parallel: whether hidden states outside the matrix products are cut along the sequence.
        pipeline_group: ranks that hold the stages of one model replica.
        collection: Megatron's own carrier of all groups, to build a model with.
    """

    tensor_group: ProcessGroup
    context_group: ProcessGroup
    rows_group: ProcessGroup
    sequence_parallel: bool
    pipeline_group: ProcessGroup
    collection: ProcessGroupCollection

    @classmethod
    def from_megatron(cls, *, sequence_parallel: bool) -> Topology:
        """Read the groups that `initialize_megatron` made."""
        if sequence_parallel:
            rows_group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        else:
            rows_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return cls(
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
            context_group=parallel_state.get_context_parallel_group(),
            rows_group=rows_group,
            sequence_parallel=sequence_parallel,
            pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
            collection=ProcessGroupCollection.use_mpu_process_groups(),
        )

    @property
    def tensor_rank(self) -> int:
        return self.tensor_group.rank()

    @property
    def tensor_size(self) -> int:
        return self.tensor_group.size()

    @property
    def context_size(self) -> int:
        return self.context_group.size()

    @property
    def sequence_parts(self) -> int:
        """How many ranks share the rows of a sequence outside the matrix products."""
        return self.context_size * (self.tensor_size if self.sequence_parallel else 1)

    @property
    def stage(self) -> int:
        return self.pipeline_group.rank()

    @property
    def num_stages(self) -> int:
        return self.pipeline_group.size()

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1
