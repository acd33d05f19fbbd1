"""Every rank of one large layout in one process: TP 2 x PP 8 x DP 4, without and with 4 virtual stages.

The teacher has 80 layers, the student 32. No process group exists: everything follows from integers.
"""

from __future__ import annotations

from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_fdd.config import FddConfig
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.carry import carried_rows
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.objective import Objective
from megatron_fdd.losses.pairs import plan_pairs
from megatron_fdd.ops.head_grams import StepGrams
from megatron_fdd.step.connect import vocab_shard
from megatron_fdd.step.pipeline import PipelineWork

STAGES, TENSOR, DATA, VIRTUAL = 8, 2, 4, 4
WIDTH, LENGTH, MICRO_BATCH, VOCAB, PADDED = 64, 32, 2, 1001, 1024
SPLITS = {"1F1B": (4,) * 8, "uneven": (3, 5, 4, 4, 4, 4, 5, 3), "interleaved": (1,) * 32}
PAIRS = {
    "rule": None,
    "on the edges": ((1, 1), (4, 10), (5, 11), (32, 80)),
    "one stage": ((13, 31), (14, 35), (15, 40)),
    "far apart": ((1, 1), (32, 80)),
}


def large_plan(split: str, pairs: str, **options: Any) -> Plan:
    config = FddConfig(teacher_load="somewhere", layer_pairs=PAIRS[pairs], **options)
    return Plan(config, plan_pairs(config, 32, 80), STAGES, SPLITS[split], (10,) * STAGES, VOCAB, PADDED)


def group(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def topology_of(tensor_rank: int, stage: int, data_rank: int) -> Topology:
    values = dict.fromkeys(Topology.__slots__)
    values |= {
        "tensor_group": group(TENSOR, tensor_rank),
        "rows_group": group(TENSOR * DATA, tensor_rank + TENSOR * data_rank),
        "sequence_parallel": True,
        "context_group": group(1, 0),
        "pipeline_group": group(STAGES, stage),
    }
    return Topology(**cast(Any, values))


def steps_of(plan: Plan, topology: Topology) -> PipelineWork:
    shard = vocab_shard(PADDED, VOCAB, topology)
    config = SimpleNamespace(pipeline_dtype=torch.bfloat16, hidden_size=WIDTH)
    chunks = plan.chunks_on(topology.stage)
    objectives = [Objective(plan.config, plan.pairs, chunk, shard, StepGrams(), None) for chunk in chunks]
    students = [cast(Any, SimpleNamespace(config=config))] * len(chunks)
    return PipelineWork(students, objectives, plan, topology, None)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("split", SPLITS)
def test_each_tap_and_its_teacher_have_one_owner(split: str, pairs: str) -> None:
    plan = large_plan(split, pairs)
    first = 0
    for chunk, layers in zip(plan.chunks, plan.student_layers, strict=True):
        held = [
            index for index, pair in enumerate(plan.pairs) if first < pair.student_block <= first + layers
        ]
        assert list(chunk.pairs) == held
        first += layers
    owned = [index for stage in range(STAGES) for chunk in plan.chunks_on(stage) for index in chunk.pairs]
    assert sorted(owned) == list(range(len(plan.pairs)))
    for index, pair in enumerate(plan.pairs):
        stage = plan.teacher_stages[index]
        assert 10 * stage < pair.teacher_block <= 10 * (stage + 1)
        # The teacher's tap goes wherever the student's tap or the delta after it is computed, and nowhere else.
        users = {stage for stage in range(STAGES) if index in plan.teacher_pairs(stage)}
        owners = {
            place % STAGES
            for place, chunk in enumerate(plan.chunks)
            if index in chunk.pairs or (index == chunk.carry_in and chunk.pairs)
        }
        assert users == owners


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_boundary_carries_what_the_next_delta_behind_it_needs(split: str, pairs: str) -> None:
    plan = large_plan(split, pairs)
    place = [
        next(number for number, chunk in enumerate(plan.chunks) if index in chunk.pairs)
        for index in range(len(plan.pairs))
    ]
    for boundary, (before, after) in enumerate(pairwise(plan.chunks)):
        crossing = [index for index, (left, right) in enumerate(pairwise(place)) if left <= boundary < right]
        assert [before.carry_out] == [after.carry_in] == (crossing or [None])
    assert all(
        chunk.carry_in is chunk.carry_out is None for chunk in large_plan(split, pairs, beta=0.0).chunks
    )


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("split", ["1F1B", "uneven"])
def test_sender_and_receiver_agree_on_every_shape(split: str, pairs: str) -> None:
    plan = large_plan(split, pairs)
    plain = (LENGTH // TENSOR, MICRO_BATCH, WIDTH)
    extra = carried_rows(*plain, torch.bfloat16, with_lse=True)
    for tensor_rank, data_rank in product(range(TENSOR), range(DATA)):
        shapes = []
        for stage in range(STAGES):
            steps = steps_of(plan, topology_of(tensor_rank, stage, data_rank))
            adjust = steps.schedule_keywords(LENGTH)["adjust_tensor_shapes_fn"]
            shapes.append(adjust([plain], [plain]))
        for stage, ((_, [sent]), ([received], _)) in enumerate(pairwise(shapes)):
            carries = plan.chunks[stage].carry_out is not None
            assert sent == received == (plain[0] + extra * carries, *plain[1:])


@pytest.mark.parametrize("pairs", PAIRS)
def test_virtual_stages_have_one_shape_on_every_rank(pairs: str) -> None:
    plan = large_plan("interleaved", pairs)
    extra = carried_rows(LENGTH // TENSOR, 1, WIDTH, torch.bfloat16, with_lse=True)
    for places in product(range(TENSOR), range(STAGES), range(DATA)):
        keywords = steps_of(plan, topology_of(*places)).schedule_keywords(LENGTH)
        assert keywords == {"seq_length": LENGTH + TENSOR * extra}


def test_every_token_of_the_vocabulary_has_one_owner() -> None:
    for stage, data_rank in product(range(STAGES), range(DATA)):
        shards = [vocab_shard(PADDED, VOCAB, topology_of(rank, stage, data_rank)) for rank in range(TENSOR)]
        rows = [row for shard in shards for row in range(shard.first, shard.first + shard.num_valid)]
        assert rows == list(range(VOCAB))
