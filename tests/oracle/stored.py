"""A case whose teacher is stored: its features are written by the engine at the case's layout, and read from disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.identity import StoreIdentity, TapForm, write_identity
from megatron_fdd.data.store.lens import StoredExtras, write_stored_lens
from megatron_fdd.data.store.routed import RoutedReader
from megatron_fdd.data.store.segment import SegmentWriter
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.taught import FEATURES, FeatureReader
from megatron_fdd.data.store.unit import as_ids, units_of
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.step.teacher.stored import PlannedStore, read_blocks, read_ranges
from megatron_fdd.step.teacher.tap_format import TapFormat
from megatron_fdd.teach.megatron import MegatronEngine
from tests.oracle.reference import Shape, bias_of_head

Batches = Sequence[dict[str, Tensor]]


def write_store(
    teacher: GPTModel, plan: Plan, topology: Topology, batches: Batches, shape: Shape, form: TapForm
) -> Store:
    """Write, on all ranks, a store with the features of all batches in a new folder; return it open."""
    config = teacher.config
    blocks = sorted({pair.teacher_block for pair in plan.pairs} | {config.num_layers})
    identity = StoreIdentity(
        engine="megatron",
        teacher="toy",
        weights="",
        final_norm="",
        architecture="",
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=shape.vocab,
        blocks=blocks,
        form=form,
        token_bytes=TapFormat(config.params_dtype, form).token_bytes(config.hidden_size),
        ran={"dtype": str(config.params_dtype).removeprefix("torch.")},
    )
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    path = Path(folder[0])
    if dist.get_rank() == 0:
        write_identity(path, identity)
    dist.barrier()
    engine = MegatronEngine(identity, teacher, topology)
    writer = SegmentWriter(path, identity.digest, len(blocks), identity.token_bytes, most_units=5)
    for batch in batches:
        units = units_of_batch(batch)
        states = engine.states(units)
        if engine.writes and engine.replica == 0:
            for ids, found in zip(units, states, strict=True):
                writer.add(ids, found)
    lens = engine.lens(units_of_batch(batches[0]))
    if engine.writes and engine.replica == 0:
        assert lens is not None
        assert lens.extras.cap == shape.cap
        bias_V = bias_of_head(shape) if shape.head_bias else None
        write_stored_lens(path, replace(lens, extras=StoredExtras(bias_V, shape.cap)))
        writer.flush()
    dist.barrier()
    return Store.open(path, "--store")


def units_of_batch(batch: dict[str, Tensor]) -> list[Ids]:
    """Return the ids of every unit of a micro-batch."""
    return [
        as_ids(sample["tokens"].numpy()[first:last])
        for sample in samples(batch)
        for first, last in units_of(sample)
    ]


def samples(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the rows of a micro-batch, as a dataset gives them."""
    return [{name: value[row] for name, value in batch.items()} for row in range(batch["tokens"].shape[0])]


def taught_batches(
    stores: Sequence[PlannedStore], topology: Topology, batches: Batches
) -> list[list[dict[str, Tensor]]]:
    """Return, for each chunk of this rank, its batches with the features that it needs."""
    ranges = read_ranges(batches[0]["tokens"].shape[1], topology)
    taught = []
    for chunk in stores[0].plan.chunks_on(topology.stage):
        readers = [
            FeatureReader(each.store, read_blocks(each.plan, chunk, each.store), ranges) for each in stores
        ]
        reader = readers[0] if len(readers) == 1 else RoutedReader(tuple(readers))
        taught.append(
            [{**batch, FEATURES: reader.read(batch)} if readers[0].blocks else batch for batch in batches]
        )
    return taught


def remove(store: Store) -> None:
    """Remove a store's folder when all ranks have read what they need."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(store.path)
