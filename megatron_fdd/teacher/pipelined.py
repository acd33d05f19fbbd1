"""A teacher under a pipeline: all micro-batches of a step before the student's schedule, then taps to their users.

Teacher and student cut their layers at different places, so a sampled layer of the teacher may lie on another
stage than its partner in the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from torch import Tensor

from megatron_fdd.data.batch import Batch, get_batch
from megatron_fdd.layer_plan import Plan
from megatron_fdd.teacher import TeacherFeatures
from megatron_fdd.teacher.live import stop_before_head
from megatron_fdd.topology import Topology


class PipelinedTeacher:
    """Runs a frozen GPTModel's stage forward and holds what this stage's student needs, for one step.

    Args:
        model: this stage's part, from `build_teacher`.
        plan: the run's; it says where each pair's layers are.
    """

    def __init__(self, model: GPTModel, plan: Plan, topology: Topology) -> None:
        self.model = model
        self._layers = [pair.teacher_layer for pair in plan.pairs]
        self._stages = list(plan.teacher_stages)
        self._users = [
            [stage for stage in range(plan.num_stages) if index in plan.teacher_pairs(stage)]
            for index in range(len(plan.pairs))
        ]
        self._topology = topology
        self._mine = [index for index, stage in enumerate(self._stages) if stage == topology.stage]
        self._taps: dict[int, list[Tensor]] = {}
        self._received: dict[int, Tensor] = {}
        self._final: list[Tensor] = []

    @torch.no_grad()
    def run(self, batches: Sequence[Mapping[str, Tensor]], seq_length: int, micro_batch_size: int) -> None:
        """Forward of all micro-batches through Megatron's own forward-only schedule, then the exchange.

        Collectives over the pipeline group: the schedule's sends; for each pair one send of
        [micro-batches, S, B, T] from the teacher's stage to each other stage whose student needs it.
        """
        self._taps = {index: [] for index in self._mine}
        self._final = []
        forward_backward_pipelining_without_interleaving(
            forward_step_func=self._forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        rows = seq_length // self._topology.sequence_parts
        self._exchange((len(batches), rows, micro_batch_size, self.model.config.hidden_size))

    def features(self, index: int, _batch: Batch) -> TeacherFeatures:
        """What this stage's student needs of micro-batch `index`."""
        final_SBT = self._final[index] if self._topology.is_last_stage else None
        return TeacherFeatures(final_SBT, {pair: stacked[index] for pair, stacked in self._received.items()})

    def _forward_step(self, data_iterator: Iterator[Mapping[str, Tensor]], model: GPTModel) -> Any:
        batch = get_batch(data_iterator, torch.cuda.current_device(), self._topology.context_group)
        output = model(
            batch.tokens_BS,
            batch.position_ids_BS,
            batch.attention_mask,
            packed_seq_params=batch.packed,
            extra_block_kwargs={"extract_layer_indices": {self._layers[index] for index in self._mine}},
            output_processor=stop_before_head,
        )
        hidden_SBT, taps_SBT = output if self._mine else (output, ())
        for index, tap_SBT in zip(self._mine, taps_SBT, strict=True):
            self._taps[index].append(tap_SBT)
        if self._topology.is_last_stage:
            self._final.append(hidden_SBT)
        return hidden_SBT, _nothing

    def _exchange(self, shape: tuple[int, int, int, int]) -> None:
        """Bring each pair's taps to the stages that need them; every stage walks the pairs in one order."""
        group, me = self._topology.pipeline_group, self._topology.stage
        operations: list[dist.P2POp] = []
        self._received = {}
        for index, source in enumerate(self._stages):
            users = self._users[index]
            if source == me:
                stacked = torch.stack(self._taps.pop(index))
                if me in users:
                    self._received[index] = stacked
                operations += [
                    dist.P2POp(dist.isend, stacked, group=group, group_peer=user)
                    for user in users
                    if user != me
                ]
            elif me in users:
                config = self.model.config
                incoming = torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
                self._received[index] = incoming
                operations.append(dist.P2POp(dist.irecv, incoming, group=group, group_peer=source))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


def _nothing(_output: Tensor, non_loss_data: bool = False) -> None:
    """The schedule asks the last stage for something to collect."""
