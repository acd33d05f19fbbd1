"""The teacher that is not there: its features come with each batch, and its lens from the store.

Shape letters: S sequence (this rank's part), B micro-batch, T the teacher's width, W this rank's slice of the
vocabulary, R positions of a sample, P bytes a packed hidden state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fdd.data.batch import Batch
from megatron_fdd.data.store.lens import read_stored_extras, read_stored_head, read_stored_norm
from megatron_fdd.data.store.routed import NamedStore
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.taught import Ranges, rank_ranges
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.losses.layer_plan import ChunkPlan, Plan
from megatron_fdd.losses.lens import FinalNorm, Lens, TeacherLens
from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.step.lessons import Share, share_of
from megatron_fdd.step.teacher.lens_file import LensFile
from megatron_fdd.step.teacher.tap_format import TapFormat

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class PlannedStore:
    """A stored teacher of a run, and what is compared with it.

    Attributes:
        plan: the run's, with the layer pairs of this teacher; the student's layers are the same for all.
    """

    named: NamedStore
    plan: Plan

    @property
    def store(self) -> Store:
        """Its features."""
        return self.named.store


class StoredTeacher:
    """The features of one chunk's micro-batches, unpacked on the device as they are used.

    The final hidden states are stored before the final norm too, which is applied here.

    Args:
        number: of this teacher in the run; features are those of its own samples.
    """

    def __init__(
        self, store: Store, plan: Plan, chunk: ChunkPlan, topology: Topology, *, number: int = 0
    ) -> None:
        self._rows = {block: row for row, block in enumerate(read_blocks(plan, chunk, store))}
        self._taps = {pair: self._rows[plan.pairs[pair].teacher_block] for pair in chunk.teacher_pairs}
        self._last = self._rows[store.identity.num_layers] if chunk.is_last else None
        self._norm = read_norm(store) if chunk.is_last else None
        self._width = store.identity.hidden_size
        self._dtype = _DTYPES[store.identity.ran["dtype"]]
        self._format = TapFormat(self._dtype, store.identity.form)
        self._token_bytes = store.identity.token_bytes
        self._topology, self._number = topology, number

    def features(self, _index: int, batch: Batch) -> TeacherFeatures:
        """Return the hidden states of one micro-batch. Collectives: those of `_whole`."""
        if not self._rows:
            return TeacherFeatures(None, {})
        assert batch.teacher_features is not None, "StepHooks gave every chunk a batch with features"
        share = share_of(batch, self._number, self._topology)
        packed = self._whole(self._own(batch.teacher_features, batch, share), batch)
        unpack = partial(self._unpack, batch=batch, share=share)
        final_SBT = None
        if self._last is not None and self._norm is not None:
            final_SBT = self._norm(unpack(packed[:, self._last])).to(self._dtype)
        return TeacherFeatures(final_SBT, {pair: unpack(packed[:, row]) for pair, row in self._taps.items()})

    def _own(self, packed: Tensor, batch: Batch, share: Share) -> Tensor:
        """Return the features of this teacher's samples, [B, K, R, P]; with one teacher they are what was read."""
        if batch.teachers is None:
            return packed
        length = batch.tokens_BS.numel() // len(batch.teachers) * self._topology.context_size
        ranges = read_ranges(length, self._topology)
        shape = len(self._rows), sum(last - first for first, last in ranges), self._token_bytes
        return torch.stack([packed[sample, : math.prod(shape)].view(shape) for sample in share.samples])

    def _whole(self, packed_BKRP: Tensor, batch: Batch) -> Tensor:
        """Join what the tensor-parallel ranks have read, where each needs all of it.

        Collectives over the tensor-parallel group: one all-gather of [B, K, R, P] without sequence parallelism, and for
        packed samples; none where each rank has read the whole sample (`read_ranges`).
        """
        topology = self._topology
        is_cut_alike = topology.sequence_parallel and batch.packed is None
        assert batch.teacher_features is not None
        num_samples = len(batch.teacher_features)
        if is_cut_alike or packed_BKRP.shape[2] * num_samples == batch.tokens_BS.numel():
            return packed_BKRP
        parts = [torch.empty_like(packed_BKRP) for _ in range(topology.tensor_size)]
        dist.all_gather(parts, packed_BKRP.contiguous(), group=topology.tensor_group)
        return torch.cat(parts, dim=2)

    def _unpack(self, packed_BRP: Tensor, *, batch: Batch, share: Share) -> Tensor:
        """Unpack one block's hidden states of this teacher's samples to [S, B, T]."""
        if batch.packed is None:
            rows = packed_BRP.transpose(0, 1)
        else:  # samples one behind the other are one row, of which this rank may have a slice
            rows = packed_BRP.flatten(0, 1)[share.first : share.first + len(share.rows)].unsqueeze(1)
            rows = torch.cat([rows, rows.new_zeros(share.filler, *rows.shape[1:])]) if share.filler else rows
        return self._format.unpack(rows.contiguous().view(self._format.packed_dtype), self._width)


def read_blocks(plan: Plan, chunk: ChunkPlan, store: Store) -> tuple[int, ...]:
    """Return the teacher's blocks that a chunk needs, 1-based: those of its pairs, and the last one beside the head."""
    blocks = {plan.pairs[pair].teacher_block for pair in chunk.teacher_pairs}
    return tuple(sorted(blocks | ({store.identity.num_layers} if chunk.is_last else set())))


def read_norm(store: Store) -> FinalNorm:
    """Read the teacher's final norm to this rank's device. ValueError if the store's lens is damaged."""
    device, norm = torch.cuda.current_device(), read_stored_norm(store.path)
    bias_T = None if norm.bias_T is None else norm.bias_T.to(device)
    return FinalNorm(norm.weight_T.to(device), bias_T, norm.epsilon, norm.kind)


def read_extras(store: Store, first: int, rows: int) -> HeadExtras:
    """Read bias and soft cap of the teacher's logits to this rank's device, for rows of its head.

    Raises:
        ValueError: the store's lens is damaged.
    """
    found = read_stored_extras(store.path)
    if found.bias_V is None:
        return HeadExtras(cap=found.cap)
    bias_W = torch.zeros(rows, device=torch.cuda.current_device())
    own_V = found.bias_V[first : first + rows]
    bias_W[: len(own_V)] = own_V
    return HeadExtras(bias_W, found.cap)


def read_teacher_lens(store: Store, plan: Plan, topology: Topology) -> TeacherLens | None:
    """Read the teacher's lens on the stages that tap or hold the head; None on others.

    Each rank reads its slice of the vocabulary. Collectives: none.

    Raises:
        ValueError: the store's lens, or the lens file, is damaged.
    """
    if not (topology.is_last_stage or topology.stage in plan.tapping_stages):
        return None
    rows = plan.padded_vocab_size // topology.tensor_size
    first = topology.tensor_rank * rows
    head_WT, extras = read_stored_head(store.path, first, rows), read_extras(store, first, rows)
    norm = read_norm(store) if plan.config.lens_norm == "final" else None
    bare = Lens(head_WT.to(torch.cuda.current_device()), norm, extras)
    blocks = plan.teacher_blocks(topology.stage)
    if plan.config.teacher_lens is None or not blocks:
        return TeacherLens(bare)
    file = LensFile.open(plan.config.teacher_lens)
    return TeacherLens(bare, file.kind, file.load(blocks))


def read_ranges(length: int, place: Topology) -> Ranges:
    """Return the positions that a rank reads of a sample of `length`.

    Tensor-parallel ranks deal them among them, unless they cannot be cut equally.
    """
    context = (place.context_group.rank(), place.context_size)
    is_dealt = length // place.context_size % place.tensor_size == 0
    sequence = (place.tensor_rank, place.tensor_size) if is_dealt else (0, 1)
    return rank_ranges(length, context=context, sequence=sequence)
