"""Whole optimizer steps: a live lens keeps both copies of a tied embedding equal to the last bit."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

from megatron_fdd.arguments import chunk_layers
from megatron_fdd.distill import connect
from megatron_fdd.layer_plan import LayerPair, Plan
from megatron_fdd.live_lens import LiveLens
from megatron_fdd.topology import Topology
from tests import reference
from tests.models import build_frozen, build_student, padded_vocab
from tests.ranks import run_on_ranks
from tests.reference import STUDENT, Terms
from tests.test_layouts import LENGTH, MICRO_BATCH, Case, fdd_config, shard_vocab

STEPS = 3


def train(case: Case) -> tuple[list[float], bool]:
    """Body on every rank: the totals of three steps, and whether both embeddings ended up the same."""
    topology = Topology.from_megatron(sequence_parallel=False)
    weights = reference.random_weights(case.student, 1)
    chunks = build_student(
        case.student, weights, topology, torch.float32, ddp={"overlap_grad_reduce": case.dp > 1}
    )
    teacher_weights = reference.random_weights(case.teacher, 2)
    teacher = build_frozen(case.teacher, teacher_weights, topology, torch.float32, padded_like=case.student)
    students = unwrap_model(chunks)
    plan = Plan(
        fdd_config(case.terms),
        tuple(LayerPair(*pair) for pair in case.terms.pairs),
        topology.num_stages,
        chunk_layers(students[0].config),
        chunk_layers(teacher.config),
        shard_vocab(case),
        padded_vocab(case.student, topology),
    )
    steps = connect(plan, students, teacher, topology)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=0.0), chunks)
    batches = reference.random_batches(case.micro_batches, MICRO_BATCH, LENGTH, shard_vocab(case))
    mine = batches[topology.collection.dp.rank() :: case.dp]
    totals = []
    for _ in range(STEPS):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        means = steps.run(
            get_forward_backward_func(),
            forward_step_func=steps.forward_step,
            data_iterator=iter(mine),
            model=chunks,
            num_microbatches=len(mine),
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        optimizer.step()
        totals += [float(each["total"]) for each in means]
    return totals, _ends_are_equal(students[0].shared_embedding_or_output_weight(), topology)


def _ends_are_equal(embedding: torch.Tensor | None, topology: Topology) -> bool:
    ends: list[torch.Tensor | None] = [None] * topology.num_stages
    dist.all_gather_object(
        ends, None if embedding is None else embedding.detach(), group=topology.pipeline_group
    )
    return torch.equal(ends[0], ends[-1])


@pytest.mark.parametrize("live", [False, True])
def test_both_copies_of_a_tied_embedding_stay_bit_identical(live: bool) -> None:
    case = Case(student=replace(STUDENT, tied=True), terms=Terms(live=live))
    ((wanted, _),) = run_on_ranks(train, case.layout, {"case": case})
    split = replace(case, pp=2, dp=2)
    results = run_on_ranks(train, split.layout, {"case": split})
    assert all(equal for _, equal in results)
    last_stage = [totals for totals, _ in results if totals]
    assert len(wanted) == STEPS
    assert wanted[0] > wanted[-1]
    for totals in last_stage:
        assert totals == pytest.approx(wanted, rel=1e-5)


def forget_the_first_stage(self: LiveLens, model: GPTModel, num_tokens: torch.Tensor) -> None:
    with patch.object(model, "share_embeddings_and_output_weights", False):
        real_send_home(self, model, num_tokens)


real_send_home = LiveLens.send_home


def train_forgetting(case: Case) -> tuple[list[float], bool]:
    """As `train`, the first stage's copy never hearing of the inner layers."""
    with patch.object(LiveLens, "send_home", forget_the_first_stage):
        return train(case)


def test_a_forgotten_copy_would_be_noticed() -> None:
    case = Case(pp=2, student=replace(STUDENT, tied=True), terms=Terms(live=True))
    results = run_on_ranks(train_forgetting, case.layout, {"case": case})
    assert not any(equal for _, equal in results)
