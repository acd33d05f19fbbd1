"""The process groups of a run, read once from Megatron and handed around."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Topology:
    """The place of this rank in the run. Nothing else in the package reads `parallel_state`.

    Attributes:
        tensor_group: ranks that share a model replica by tensor parallelism.
        context_group: ranks that share a sequence by context parallelism.
        rows_group: ranks whose token rows differ: data and context parallel, and tensor parallel too when
            sequence parallel.
        sequence_parallel: true if hidden states outside the matrix products are cut along the sequence.
        pipeline_group: ranks that hold the stages of one model replica.
        collection: Megatron's own carrier of all groups, with which a model is built.
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

    def with_experts(self, size: int) -> Topology:
        """Return the same ranks with expert groups of their own, for a teacher that spreads its experts differently.

        Megatron's globals know only the student's expert groups. All other groups are shared with the student. The new
        ones wait for a rank as long as the student's do (`--distributed-timeout-minutes`).

        Args:
            size: how many ranks share the experts of a layer; checked by `check_experts`.

        Collectives over all ranks, unless the student's size is the same: one all-gather of the stages, and making
        the groups.
        """
        if size == self.collection.ep.size():
            return self
        stages = [0] * dist.get_world_size()
        dist.all_gather_object(stages, self.stage)
        tensor = self.collection.expt_tp.size()
        by_name: dict[str, list[list[int]]] = {"ep": [], "tp_ep": [], "expt_dp": []}
        for stage in range(self.num_stages):
            ranks = [rank for rank, its_stage in enumerate(stages) if its_stage == stage]
            blocks = [ranks[first : first + tensor * size] for first in range(0, len(ranks), tensor * size)]
            # In Megatron's order: the slices of one expert are neighbours, then come the other experts.
            by_name["tp_ep"] += blocks
            by_name["ep"] += [block[part::tensor] for block in blocks for part in range(tensor)]
            by_name["expt_dp"] += [list(copies) for copies in zip(*blocks, strict=True)]
        collection = ProcessGroupCollection(**vars(self.collection))
        timeout = _timeout_of(self.collection.ep)
        for name, enumeration in by_name.items():
            setattr(collection, name, dist.new_subgroups_by_enumeration(enumeration, timeout=timeout)[0])
        # Groups that only an optimizer or a gradient reduction uses; they would be the student's.
        for name in ("tp_ep_pp", "tp_ep_pp_with_egtp_remat", "intra_expt_dp", "expt_dp_gtp_remat"):
            setattr(collection, name, None)
        return replace(self, collection=collection)

    @property
    def tensor_rank(self) -> int:
        """This rank's number in the tensor-parallel group."""
        return self.tensor_group.rank()

    @property
    def tensor_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.tensor_group.size()

    @property
    def context_size(self) -> int:
        """Number of context-parallel ranks."""
        return self.context_group.size()

    @property
    def sequence_parts(self) -> int:
        """Number of ranks that share the rows of a sequence outside the matrix products."""
        return self.context_size * (self.tensor_size if self.sequence_parallel else 1)

    @property
    def rows_rank(self) -> int:
        """Number of this rank among those whose token rows differ; the same on all stages."""
        return self.rows_group.rank()

    @property
    def stage(self) -> int:
        """The pipeline stage of this rank, from 0."""
        return self.pipeline_group.rank()

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return self.pipeline_group.size()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage."""
        return self.stage == self.num_stages - 1


def _timeout_of(group: ProcessGroup) -> timedelta:
    """Return how long a group's collectives wait for other ranks; torch has no public name for it."""
    return group._get_backend(group._device_types[0]).options._timeout
