"""The teacher that is not there: its features come with each batch, and its lens from the store.

Shape letters: S sequence (this rank's part), B micro-batch, T the teacher's width, W this rank's slice of the
vocabulary, R positions of a sample, P bytes a packed hidden state.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from shlex import quote
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from megatron_fdd.data.batch import Batch
from megatron_fdd.data.store.counted import count_units, keep
from megatron_fdd.data.store.coverage import RunUnits, Source, places_of, read_ids, sources_of
from megatron_fdd.data.store.lens import read_stored_extras, read_stored_head, read_stored_norm
from megatron_fdd.data.store.origin import whereabouts
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.taught import (
    Asking,
    FeatureReader,
    Features,
    Ranges,
    TaughtDataset,
    rank_ranges,
)
from megatron_fdd.host import console
from megatron_fdd.host.together import together
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.losses.layer_plan import ChunkPlan, Plan
from megatron_fdd.losses.lens import FinalNorm, Lens, TeacherLens
from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.step.teacher.followed import FollowedStream
from megatron_fdd.step.teacher.lens_file import LensFile
from megatron_fdd.step.teacher.tap_format import TapFormat

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StoredTeacher:
    """The features of one chunk's micro-batches, unpacked on the device as they are used.

    The final hidden states are stored before the final norm too, which is applied here.
    """

    def __init__(self, store: Store, plan: Plan, chunk: ChunkPlan, topology: Topology) -> None:
        self._rows = {block: row for row, block in enumerate(read_blocks(plan, chunk, store))}
        self._taps = {pair: self._rows[plan.pairs[pair].teacher_block] for pair in chunk.teacher_pairs}
        self._last = self._rows[store.identity.num_layers] if chunk.is_last else None
        self._norm = read_norm(store) if chunk.is_last else None
        self._width = store.identity.hidden_size
        self._dtype = _DTYPES[store.identity.ran["dtype"]]
        self._format = TapFormat(self._dtype, store.identity.form)
        self._topology = topology

    def features(self, _index: int, batch: Batch) -> TeacherFeatures:
        """Return the hidden states of one micro-batch. Collectives: those of `_whole`."""
        if not self._rows:
            return TeacherFeatures(None, {})
        assert batch.teacher_features is not None, "StepHooks gave every chunk a batch with features"
        packed = self._whole(batch.teacher_features, batch)
        final_SBT = None
        if self._last is not None and self._norm is not None:
            final_SBT = self._norm(self._unpack(packed[:, self._last], batch)).to(self._dtype)
        return TeacherFeatures(
            final_SBT, {pair: self._unpack(packed[:, row], batch) for pair, row in self._taps.items()}
        )

    def _whole(self, packed_BKRP: Tensor, batch: Batch) -> Tensor:
        """Join what the tensor-parallel ranks have read, where each needs all of it.

        Collectives over the tensor-parallel group: one all-gather of [B, K, R, P] without sequence parallelism, and for
        packed samples; none where each rank has read the whole sample (`read_ranges`).
        """
        topology = self._topology
        is_cut_alike = topology.sequence_parallel and batch.packed is None
        if is_cut_alike or packed_BKRP[:, 0, :, 0].numel() == batch.tokens_BS.numel():
            return packed_BKRP
        parts = [torch.empty_like(packed_BKRP) for _ in range(topology.tensor_size)]
        dist.all_gather(parts, packed_BKRP.contiguous(), group=topology.tensor_group)
        return torch.cat(parts, dim=2)

    def _unpack(self, packed_BRP: Tensor, batch: Batch) -> Tensor:
        """Unpack one block's hidden states to [S, B, T]."""
        if batch.packed is None:
            rows = packed_BRP.transpose(0, 1)
        else:  # samples one behind the other are one row, of which this rank may have a slice
            rows = packed_BRP.flatten(0, 1).unsqueeze(1)
            if self._topology.sequence_parallel:
                rows = rows.chunk(self._topology.tensor_size)[self._topology.tensor_rank]
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


def read_extras(store: Store, first: int, rows: int) -> HeadExtras | None:
    """Read bias and soft cap of the teacher's logits to this rank's device, for rows of its head; None: neither.

    Raises:
        ValueError: the store's lens is damaged.
    """
    found = read_stored_extras(store.path)
    if found.bias_V is None:
        return None if found.cap is None else HeadExtras(cap=found.cap)
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
    bare = Lens(head_WT.to(torch.cuda.current_device()), norm)
    blocks = plan.teacher_blocks(topology.stage)
    if plan.config.teacher_lens is None or not blocks:
        return TeacherLens(bare, extras=extras)
    file = LensFile.open(plan.config.teacher_lens)
    return TeacherLens(bare, file.kind, file.load(blocks), extras)


def with_features(
    provider: Callable[..., Any],
    store: Store,
    plan: Plan,
    args: argparse.Namespace,
    stream: FollowedStream | None = None,
) -> Callable[..., list[Any]]:
    """Return a provider of the same datasets, whose samples carry what this rank's chunk needs.

    Args:
        provider: with the interface of `data.provider.train_valid_test_provider`.
        stream: where the features come from, if the store is one.

    Collectives, when the datasets are made: those of `check_coverage`; with a stream one all-gather over all ranks.
    """

    def provide(num_samples: Any, vp_stage: int | None = None) -> list[Any]:
        place = Topology.from_megatron(sequence_parallel=args.sequence_parallel)
        chunk = plan.chunks_on(place.stage)[vp_stage or 0]
        blocks = read_blocks(plan, chunk, store)
        found: list[Any] = list(provider(num_samples, vp_stage=vp_stage))
        features: Features = store
        if not vp_stage and stream is None:  # the chunks of a stage read the same data
            check_coverage(sources_of(found, args), store)
        asks: list[Asking | None] = [None] * len(found)
        if stream is not None:
            with together() if not vp_stage else nullcontext():
                features = stream.open(place, sum(1 for each in _flat(found) if each is not None))
            if not vp_stage:
                asks = [stream.asking(number, count) for number, count in enumerate(num_samples)]
        reader = FeatureReader(features, blocks, read_ranges(args.seq_length, place)) if blocks else None
        return [
            [_taught(e, reader, ask) for e in each] if isinstance(each, list) else _taught(each, reader, ask)
            for each, ask in zip(found, asks, strict=True)
        ]

    return provide


def _flat(found: Sequence[Any]) -> list[Any]:
    """Return the data sets of a provider, those of a list too."""
    return [each for part in found for each in (part if isinstance(part, list) else [part])]


def check_coverage(sources: Sequence[Source], store: Store) -> None:
    """Refuse a store that lacks a unit of this run's data; every unit is looked up.

    Collectives over all ranks: one all-gather of the index's hash, those of `count_units`, and one all-gather.

    Raises:
        ValueError: says how many are missing, where the first is, and what adds them; or ranks see different stores.
            The same on every rank.
    """
    started_s = time.perf_counter()
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, store.index.digest)
    if len(set(digests)) > 1:
        raise ValueError(
            f"--fdd-teacher-store {store.path}: ranks see different segments in it; start again when fdd teach has "
            "ended and all machines see what it wrote"
        )
    counted = count_units(sources, store.path)
    with together():
        if counted.units is not None:
            _check_units(counted.units, sources, store)
            keep(store.path, counted)
            how = "which were counted before, " if counted.is_kept else ""
            console.say(
                f"all {counted.units.num_read} units of this run's data are in {store.path} ({how}looked up in "
                f"{time.perf_counter() - started_s:.1f} s)"
            )


def _check_units(units: RunUnits, sources: Sequence[Source], store: Store) -> None:
    """Refuse a store that lacks one of these units."""
    missing = units.missing(store.index)
    if not len(missing):
        return
    [first] = places_of(missing[:1])
    (ids,) = read_ids(sources, [first])
    tokens = int((missing["last"] - missing["first"]).sum(dtype=np.int64))
    identity = store.identity
    dtype = f" --dtype {identity.ran['dtype']}" if identity.engine != "megatron" else ""
    raise ValueError(
        f"--fdd-teacher-store {store.path}: lacks {len(missing)} units of this run's data, {tokens} tokens; the first: "
        f"{whereabouts(sources[first.dataset], first)}, ids {ids[:6].tolist()}. Add them with fdd "
        f"teach --engine {identity.engine} --teacher {quote(identity.teacher)} --store "
        f"{quote(str(store.path))} --blocks "
        f"{','.join(map(str, identity.blocks))} --form {identity.form}{dtype} and this "
        "run's data flags (rows of text depend on --seed, --split, --seq-length and the number of samples)"
    )


def _taught(
    dataset: Dataset[Any] | None, reader: FeatureReader | None, ask: Asking | None
) -> Dataset[Any] | None:
    if dataset is None or (reader is None and ask is None):
        return dataset
    return TaughtDataset(dataset, reader, ask)


def read_ranges(length: int, place: Topology) -> Ranges:
    """Return the positions that a rank reads of a sample of `length`.

    Tensor-parallel ranks deal them among them, unless they cannot be cut equally.
    """
    context = (place.context_group.rank(), place.context_size)
    is_dealt = length // place.context_size % place.tensor_size == 0
    sequence = (place.tensor_rank, place.tensor_size) if is_dealt else (0, 1)
    return rank_ranges(length, context=context, sequence=sequence)
