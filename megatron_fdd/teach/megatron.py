"""The engine `megatron`: the teacher is a GPTModel in its own layout, frozen, without its head at work.

Shape letters: B rows, S sequence, T the teacher's width, P packed width in bytes, V vocabulary, W this rank's slice of
it.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from torch import Tensor

from megatron_fdd.data.batch import get_batch
from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.identity import StoreIdentity, TapForm
from megatron_fdd.data.store.lens import LARGEST_ERROR, StoredExtras, StoredLens, StoredNorm
from megatron_fdd.data.store.segment import Bytes
from megatron_fdd.host.layer_specs import logit_cap
from megatron_fdd.host.model import chunk_layers
from megatron_fdd.host.model_fields import ARCHITECTURE
from megatron_fdd.host.topology import Topology
from megatron_fdd.plan.run import PreparedRun
from megatron_fdd.step.lens import read_final_norm, read_head
from megatron_fdd.step.taps import forward_with_taps, stop_before_head
from megatron_fdd.step.teacher.lens_file import TeacherIdentity
from megatron_fdd.step.teacher.tap_format import TapFormat
from megatron_fdd.teach.soundness import check_states

# The form that keeps what a teacher computes in.
_FORM_OF: dict[str, TapForm] = {"float32": "float32", "bfloat16": "bf16"}
# FP8's products need a number of tokens that is a multiple of it.
_FP8_MULTIPLE = 32


def describe(run: PreparedRun, blocks: Sequence[int], form: TapForm | None) -> StoreIdentity:
    """Return what a store of this run's teacher holds. Collectives: none.

    Args:
        form: None: that of the precision in which the teacher computes.

    Raises:
        ValueError: the checkpoint cannot be read, or a hidden state cannot be packed in this form.
    """
    args, path = run.teacher, run.teacher_checkpoint
    assert args is not None
    assert path is not None
    assert run.teacher_size is not None
    dtype = str(args.params_dtype).removeprefix("torch.")
    own = _FORM_OF[dtype]
    if form in _FORM_OF.values() and form != own:
        raise ValueError(
            f"--form {form}: the teacher computes in {dtype}, and its features are stored so, or packed; use --form "
            f"{own}, int8 or fp8, or give --bf16 if the teacher is to compute in it"
        )
    packing = TapFormat(args.params_dtype, form or own)
    packing.check_width(args.hidden_size, f"--form {form}")
    architecture = {name: repr(getattr(args, name, None)) for name in ARCHITECTURE}
    precision = f"{args.fp8} {args.fp8_recipe}" if args.fp8 else "no"
    return StoreIdentity(
        engine="megatron",
        teacher=str(run.config.teacher_load),
        weights="",  # known when they are loaded
        final_norm=TeacherIdentity.read(path, args).final_norm,
        architecture=hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest(),
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        vocab_size=run.teacher_size.vocab_size,
        blocks=list(blocks),
        form=packing.form,
        token_bytes=packing.token_bytes(args.hidden_size),
        ran={
            "dtype": dtype,
            "fp8": precision,
            "modules": args.transformer_impl,
            "megatron-core": version("megatron-core"),
        },
    )


class MegatronEngine:
    """One rank of a teacher that is cut by tensor, sequence, context, pipeline and expert parallelism.

    The last stage's first rank of a replica writes.

    Args:
        model: this stage's part, from `build_teacher`.
    """

    def __init__(self, identity: StoreIdentity, model: GPTModel, topology: Topology) -> None:
        self.identity = identity
        self._model, self._topology = model, topology
        self.replica, self.num_replicas = topology.collection.dp.rank(), topology.collection.dp.size()
        self._is_first = topology.tensor_rank == topology.context_group.rank() == 0
        self.writes = topology.is_last_stage and self._is_first
        self._layers = [block - 1 for block in identity.blocks]
        self._format = TapFormat(model.config.params_dtype, identity.form)
        self._communicator = P2PCommunicator(topology.pipeline_group, model.config)
        self._edges = list(accumulate(chunk_layers(model.config)))
        pieces = 2 * topology.context_size if topology.context_size > 1 else 1
        self._cut = pieces * (topology.tensor_size if topology.sequence_parallel else 1)

    @torch.no_grad()
    def states(self, units: Sequence[Ids]) -> list[Bytes]:
        """Run some units; what `Engine.states` says.

        Collectives: those of the model's forward pass and of Megatron's schedule; one all-gather a block over the
        tensor-parallel group under sequence parallelism, and over the context-parallel group; one send a block to the
        last stage.
        """
        samples = self._samples(units)
        outputs = self._run(samples)
        found: list[Bytes] = []
        for number, (taps, _) in enumerate(outputs):
            is_token_SB = self._is_token(samples[number])
            for tap_SBT in taps.values():
                check_states(tap_SBT, is_token_SB)
            blocks = self._on_writer(
                {layer: self._whole(tap) for layer, tap in taps.items()}, samples[number]
            )
            if not self.writes:
                continue
            # [T, S, B, P] in host memory, row by row.
            stacked = torch.stack([blocks[layer] for layer in self._layers]).cpu().numpy()
            rows = samples[number]["tokens"].shape[0]
            for row, ids in enumerate(units[number * rows : (number + 1) * rows]):
                found.append(np.ascontiguousarray(stacked[:, : len(ids), row]))
        return found

    @torch.no_grad()
    def lens(self, units: Sequence[Ids]) -> StoredLens | None:
        """Return the lens; what `Engine.lens` says.

        The model's own final norm is compared with the stored one's formula through the head.

        Collectives: those of `states`; on the last stage one all-gather of the head over the tensor-parallel group,
        and one all-reduce.
        """
        outputs = self._run(self._samples(units))
        if not self._topology.is_last_stage:
            return None
        group = self._topology.tensor_group
        head_WT, norm = read_head(self._model).detach(), read_final_norm(self._model)
        taps, final_SBT = outputs[0]
        assert final_SBT is not None
        last_SBT = taps[self._layers[-1]]
        wanted = final_SBT.float() @ head_WT.float().T
        error = (norm(last_SBT) @ head_WT.float().T - wanted).abs().max()
        largest = torch.stack([error, wanted.abs().max()])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        relative = float(largest[0] / largest[1].clamp(min=1e-30))
        if not relative <= LARGEST_ERROR[final_SBT.dtype]:
            raise ValueError(
                f"--teacher: its logits are not those of its final norm and head (they differ by {relative:.1e} of the "
                "largest): something else changes its last block's output, which a lens cannot do; use another teacher"
            )
        shards = [torch.empty_like(head_WT) for _ in range(group.size())]
        dist.all_gather(shards, head_WT.contiguous(), group=group)
        if not self.writes:
            return None
        bias_T = None if norm.bias_H is None else norm.bias_H.detach() * norm.factor
        head_VT = torch.cat(shards)[: self.identity.vocab_size].cpu()
        return StoredLens(
            StoredNorm(norm.kind, norm.weight_H.detach().float() * norm.factor, bias_T, norm.epsilon),
            head_VT,
            relative,
            StoredExtras(cap=logit_cap(self._model.config)),
        )

    def _samples(self, units: Sequence[Ids]) -> list[dict[str, Tensor]]:
        """Make micro-batches of rows that are padded on the right; under a pipeline several, so that stages overlap.

        Their number does not depend on the units: replicas that share experts run equally many. What lacks units is
        filled with rows of zeros.
        """
        count = 1 if self._topology.num_stages == 1 else 4 * self._topology.num_stages
        rows = -(-len(units) // count)
        multiple = math.lcm(self._cut, _FP8_MULTIPLE if self._model.config.fp8 else 1)
        length = -(-max(map(len, units)) // multiple) * multiple
        samples = []
        for first in range(0, count * rows, rows):
            tokens = torch.zeros(rows, length, dtype=torch.int64)
            for row, ids in enumerate(units[first : first + rows]):
                tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            mask = torch.ones(rows, length)
            lengths = torch.tensor([*map(len, units[first : first + rows]), *[0] * rows])[:rows, None]
            samples.append(
                {
                    "tokens": tokens,
                    "labels": torch.zeros_like(tokens),
                    "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
                    "loss_mask": mask,
                    "token_mask": (torch.arange(length) < lengths).float(),
                }
            )
        return samples

    def _run(self, samples: Sequence[dict[str, Tensor]]) -> list[tuple[dict[int, Tensor], Tensor | None]]:
        """Run micro-batches; return for each the outputs of this stage's stored blocks, and the last stage's output."""
        results: list[tuple[dict[int, Tensor], Tensor | None]] = []
        place, group = torch.cuda.current_device(), self._topology.context_group
        own = [layer for layer in self._layers if self._stage_of(layer) == self._topology.stage]

        def forward(data_iterator: Any, model: GPTModel) -> Any:
            batch = get_batch(data_iterator, place, group)
            hidden_SBT, taps_SBT = forward_with_taps(model, batch, own, stop_before_head)
            final = hidden_SBT if self._topology.is_last_stage else None
            results.append((dict(zip(own, taps_SBT, strict=True)), final))
            return hidden_SBT, _nothing

        iterator = iter(samples)
        if self._topology.num_stages == 1:
            for _ in samples:
                forward(iterator, self._model)
            return results
        rows, length = samples[0]["tokens"].shape
        forward_backward_pipelining_without_interleaving(
            forward_step_func=forward,
            data_iterator=iterator,
            model=self._model,
            num_microbatches=len(samples),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=self._communicator,
            pg_collection=self._topology.collection,
        )
        return results

    def _is_token(self, sample: dict[str, Tensor]) -> Tensor:
        """Return which of this rank's positions of a micro-batch are real tokens, bool [S, B]."""
        topology = self._topology
        batch = get_batch(iter([sample]), torch.cuda.current_device(), topology.context_group)
        is_token_SB = batch.token_mask_BS.T > 0
        if topology.sequence_parallel:
            return is_token_SB.chunk(topology.tensor_size)[topology.tensor_rank]
        return is_token_SB

    def _whole(self, tap_SBT: Tensor) -> Tensor:
        """Pack a block's output, and gather its whole sequence: uint8 [S, B, P] on every rank of the stage."""
        packed = self._format.pack(tap_SBT).contiguous().view(torch.uint8)
        topology = self._topology
        if topology.sequence_parallel:
            packed = _gathered(packed, topology.tensor_group)
        if topology.context_size > 1:
            size = topology.context_size
            pieces = _gathered(packed, topology.context_group).chunk(2 * size)
            # Rank r holds the pieces r and 2 size - 1 - r.
            order = [2 * min(piece, 2 * size - 1 - piece) + (piece >= size) for piece in range(2 * size)]
            packed = torch.cat([pieces[place] for place in order])
        return packed

    def _on_writer(self, blocks: dict[int, Tensor], sample: dict[str, Tensor]) -> dict[int, Tensor]:
        """Bring the blocks of all stages to the last stage's first rank."""
        topology = self._topology
        if topology.num_stages == 1 or not self._is_first:
            return blocks
        rows, length = sample["tokens"].shape
        shape = (length, rows, self.identity.token_bytes)
        last, group = topology.num_stages - 1, topology.pipeline_group
        for layer in self._layers:
            source = self._stage_of(layer)
            if source == last:
                continue
            if topology.stage == source:
                dist.send(blocks[layer], group=group, group_dst=last)
            elif topology.stage == last:
                blocks[layer] = torch.empty(shape, dtype=torch.uint8, device=torch.cuda.current_device())
                dist.recv(blocks[layer], group=group, group_src=source)
        return blocks

    def _stage_of(self, layer: int) -> int:
        """Return the stage that holds a layer."""
        return bisect_right(self._edges, layer)


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather parts of a tensor along its first dimension."""
    whole = torch.empty(group.size() * part.shape[0], *part.shape[1:], dtype=part.dtype, device=part.device)
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _nothing(_output: Tensor, non_loss_data: bool = False) -> None:
    """Return nothing to the schedule, which asks the last stage for something to collect."""
