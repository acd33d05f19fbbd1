"""The teacher under a pipeline: it runs all micro-batches before the student's schedule, then sends its taps.

Teacher and student cut their layers at different places, so a sampled layer of the teacher may lie on another
stage than its partner in the student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from torch import Tensor

from megatron_fdd.data.batch import Batch, get_batch
from megatron_fdd.host.sends import let_host_run_ahead
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.step.taps import forward_with_taps, stop_before_head
from megatron_fdd.step.teacher.host_memory import HostCopy, HostMemory
from megatron_fdd.step.teacher.tap_format import TapFormat

Kept = Tensor | HostCopy
Fetched = tuple[Callable[[], Tensor] | None, dict[int, Callable[[], Tensor]]]


class PipelinedTeacher:
    """One stage of a frozen GPTModel that runs forward and holds, for one step, what this stage's student needs.

    With `--fdd-offload-teacher-taps` they wait in host memory, and the device holds those of one micro-batch and of
    the next one, which is fetched meanwhile. With `--fdd-tap-dtype` taps wait and travel packed; the final hidden
    states never do.

    Args:
        model: this stage's part, from `build_teacher`.
        plan: the run's plan, which says where each pair's layers are.
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
        let_host_run_ahead(model.config)
        self._communicator = P2PCommunicator(topology.pipeline_group, model.config)
        self._host = HostMemory() if plan.config.offload_teacher_taps else None
        self._format = TapFormat(model.config.params_dtype, plan.config.tap_dtype)
        self._width = model.config.hidden_size
        self._mine = [index for index, stage in enumerate(self._stages) if stage == topology.stage]
        # For each micro-batch: packed taps of this stage's teacher and for this stage's student; final hidden states.
        self._taps: list[dict[int, Kept]] = []
        self._received: list[dict[int, Kept]] = []
        self._final: list[Kept] = []
        self._coming: tuple[int, Fetched] | None = None  # the micro-batch that is fetched ahead

    @torch.no_grad()
    def run(self, batches: Sequence[Mapping[str, Tensor]], seq_length: int, micro_batch_size: int) -> None:
        """Run all micro-batches forward through Megatron's own forward-only schedule, then exchange the taps.

        Collectives over the pipeline group: the schedule's sends; for each micro-batch and pair one send of
        [S, B, packed width of T] from the teacher's stage to each other stage whose student needs it.
        """
        self._forget()
        forward_backward_pipelining_without_interleaving(
            forward_step_func=self._forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=self._communicator,
            pg_collection=self._topology.collection,
        )
        rows = seq_length // self._topology.sequence_parts
        shape = (rows, micro_batch_size, self._format.packed_width(self._width))
        for index in range(len(batches)):
            mine = self._taps[index]
            self._received.append(self._exchange(mine, shape))
            self._free(tap for pair, tap in mine.items() if pair not in self._received[index])
            self._taps[index] = {}

    def features(self, index: int, _batch: Batch) -> TeacherFeatures:
        """Return what this stage's student needs for micro-batch `index`."""
        coming = self._coming
        final, taps = coming[1] if coming is not None and coming[0] == index else self._fetch(index)
        self._coming = None
        features = TeacherFeatures(
            None if final is None else final(),
            {pair: self._format.unpack(tap(), self._width) for pair, tap in taps.items()},
        )
        if self._host is not None and index + 1 < len(self._received):
            self._coming = (index + 1, self._fetch(index + 1))
        return features

    def _forward_step(self, data_iterator: Iterator[Mapping[str, Tensor]], model: GPTModel) -> Any:
        batch = get_batch(data_iterator, torch.cuda.current_device(), self._topology.context_group)
        layers = [self._layers[index] for index in self._mine]
        hidden_SBT, taps_SBT = forward_with_taps(model, batch, layers, stop_before_head)
        self._taps.append(
            {
                index: self._keep(self._format.pack(tap_SBT))
                for index, tap_SBT in zip(self._mine, taps_SBT, strict=True)
            }
        )
        if self._topology.is_last_stage:
            self._final.append(self._keep(hidden_SBT))
        return hidden_SBT, _nothing

    def _exchange(self, taps: Mapping[int, Kept], shape: tuple[int, int, int]) -> dict[int, Kept]:
        """Bring a micro-batch's packed taps to the stages that need them; all stages take the pairs in one order."""
        group, me = self._topology.pipeline_group, self._topology.stage
        operations: list[dist.P2POp] = []
        received: dict[int, Tensor] = {}
        kept: dict[int, Kept] = {}
        for index, (source, users) in enumerate(zip(self._stages, self._users, strict=True)):
            if source == me:
                others = [user for user in users if user != me]
                if others:
                    tap = self._on_device(taps[index])().contiguous()
                    operations += [
                        dist.P2POp(dist.isend, tap, group=group, group_peer=user) for user in others
                    ]
                if me in users:
                    kept[index] = taps[index]
            elif me in users:
                incoming = torch.empty(
                    shape, dtype=self._format.packed_dtype, device=torch.cuda.current_device()
                )
                received[index] = incoming
                operations.append(dist.P2POp(dist.irecv, incoming, group=group, group_peer=source))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return kept | {index: self._keep(tap) for index, tap in received.items()}

    def _keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor until its micro-batch: where it is, or in host memory."""
        return tensor if self._host is None else self._host.keep(tensor)

    def _on_device(self, kept: Kept) -> Callable[[], Tensor]:
        """Start to bring a tensor to the device; the result returns it when it is there."""
        if isinstance(kept, Tensor):
            return lambda: kept
        assert self._host is not None
        return self._host.fetch(kept).wait

    def _fetch(self, index: int) -> Fetched:
        """Start to bring the final hidden states (on the last stage) and the taps of a micro-batch to the device."""
        final = self._on_device(self._final[index]) if self._topology.is_last_stage else None
        return final, {pair: self._on_device(tap) for pair, tap in self._received[index].items()}

    def _forget(self) -> None:
        """Give back what the last step has left."""
        for taps in self._received:
            self._free(taps.values())
        self._free(self._final)
        self._taps, self._received, self._final, self._coming = [], [], [], None

    def _free(self, kept: Iterable[Kept]) -> None:
        if self._host is not None:
            self._host.free(each for each in kept if isinstance(each, HostCopy))


def _nothing(_output: Tensor, non_loss_data: bool = False) -> None:
    """Return nothing to the schedule, which asks the last stage for something to collect."""
