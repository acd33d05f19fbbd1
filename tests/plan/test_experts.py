"""Mixtures of experts: layouts, their process groups, Megatron's own router losses, and the counts of the plan."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_fdd.data.batch import get_batch
from megatron_fdd.host.topology import Topology
from megatron_fdd.plan.model_shape import ModelShape
from megatron_fdd.plan.sizes import held_parameters
from megatron_fdd.step.teacher.arguments import teacher_args
from megatron_fdd.step.teacher.loading import build_stage
from tests.harness.ranks import Layout, distributed, run_on_ranks
from tests.oracle import reference
from tests.oracle.case import (
    ALL_EXPERTS,
    FULL_UNIFORM,
    LENGTH,
    MICRO_BATCH,
    STUDENT_EXPERTS,
    TEACHER_EXPERTS,
    Case,
    assert_equal,
    expected,
    relative,
    run_step,
    shard_vocab,
    small,
)
from tests.oracle.models import build_student, full_gradients, model_config, padded_vocab
from tests.oracle.reference import TEACHER, Terms, Weights

EXPERTS = {
    "experts": Case(**ALL_EXPERTS),
    "dp2-experts": Case(dp=2, **ALL_EXPERTS),
    "dp2-experts-all-tokens": Case(dp=2, terms=Terms(all_tokens=True), **ALL_EXPERTS),
    "ep2-student": Case(dp=2, ep=2, student=STUDENT_EXPERTS),
    "ep2-teacher": Case(dp=2, teacher_ep=2, teacher=TEACHER_EXPERTS),
    "ep2-both": Case(dp=2, ep=2, teacher_ep=2, **ALL_EXPERTS),
    "ep2-student-ep1-teacher": Case(dp=2, ep=2, **ALL_EXPERTS),
    "pp2-experts": Case(pp=2, **ALL_EXPERTS),
    "pp2-dp2-ep2-both": Case(pp=2, dp=2, ep=2, teacher_ep=2, **ALL_EXPERTS),
    "pp2-dp2-ep2-teacher": Case(pp=2, dp=2, teacher_ep=2, teacher=TEACHER_EXPERTS),
    "pp2-vpp3-experts": Case(pp=2, vpp=3, **ALL_EXPERTS),
    "pp2-experts-loss-scale": Case(pp=2, loss_scale=128.0, student=STUDENT_EXPERTS),
    "tp2-teacher-without-sp": Case(tp=2, teacher=TEACHER_EXPERTS),
    "tp2-dp2-sp-ep2": Case(tp=2, dp=2, ep=2, teacher_ep=2, sequence_parallel=True, **ALL_EXPERTS),
    "tp2-dp2-sp-ep2-teacher": Case(tp=2, dp=2, teacher_ep=2, sequence_parallel=True, teacher=TEACHER_EXPERTS),
    "cp2-ep2": Case(cp=2, ep=2, teacher_ep=2, **ALL_EXPERTS),
    "packed-ep2": Case(
        dp=2,
        ep=2,
        teacher_ep=2,
        packed=True,
        student=replace(STUDENT_EXPERTS, aux_loss=0.0),
        teacher=TEACHER_EXPERTS,
    ),
    "experts-full-uniform": Case(recompute=FULL_UNIFORM, **ALL_EXPERTS),
}


@pytest.mark.tier("default")
@pytest.mark.parametrize("name", EXPERTS)
def test_terms_and_gradients_do_not_depend_on_the_layout(name: str) -> None:
    """The gradients include the router's balancing loss."""
    case = small(EXPERTS[name])
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)


# The vocabulary is a multiple of the padding, because Megatron's own cross-entropy counts padded rows.
WHOLE_VOCABULARY = replace(STUDENT_EXPERTS, vocab=48)
ITS_TEACHER = replace(TEACHER, vocab=48)
ONLY_CE = Terms(alpha=0.0, beta=0.0, kd=0.0, ce=1.0)


def expert_groups(size: int) -> dict[str, list[int]]:
    """Return, on every rank, the ranks of each expert group of a teacher whose experts `size` ranks share."""
    collection = Topology.from_megatron(sequence_parallel=False).with_experts(size).collection
    names = ("ep", "expt_tp", "tp_ep", "expt_dp")
    return {name: dist.get_process_group_ranks(getattr(collection, name)) for name in names}


@pytest.mark.tier("default")
@pytest.mark.parametrize("sizes", [{"dp": 4}, {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}])
def test_groups_are_those_that_megatron_makes(sizes: dict[str, int]) -> None:
    wanted = run_on_ranks(expert_groups, Layout(ep=2, **sizes), {"size": 2})
    assert run_on_ranks(expert_groups, Layout(**sizes), {"size": 2}) == wanted
    # The reverse: the student's experts are spread, the teacher's are not.
    single = run_on_ranks(expert_groups, Layout(**sizes), {"size": 1})
    assert run_on_ranks(expert_groups, Layout(ep=2, **sizes), {"size": 1}) == single


@distributed(dp=2)
def test_the_groups_wait_as_long_as_the_students() -> None:
    topology = Topology.from_megatron(sequence_parallel=False)
    topology.collection.ep = dist.new_subgroups(1, timeout=timedelta(minutes=7))[0]
    with patch.object(dist, "new_subgroups_by_enumeration", wraps=dist.new_subgroups_by_enumeration) as made:
        topology.with_experts(2)
    assert [call.kwargs["timeout"] for call in made.call_args_list] == 3 * [timedelta(minutes=7)]


def plain_gradients(case: Case) -> Weights:
    """Return, on every rank, the gradients of Megatron's own cross-entropy, without this package."""
    topology = Topology.from_megatron(sequence_parallel=case.sequence_parallel)
    weights = reference.random_weights(case.student, 1)
    options = dict(case.recompute) | {"grad_scale_func": lambda loss: loss * case.loss_scale}
    chunks = build_student(case.student, weights, topology, torch.float32, **options)
    batches = reference.random_batches(case.micro_batches, MICRO_BATCH, LENGTH, shard_vocab(case))
    mine = batches[topology.collection.dp.rank() :: case.dp]
    chunks[0].zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=plain_step,
        data_iterator=iter(mine),
        model=chunks,
        num_microbatches=len(mine),
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    gradients = full_gradients(chunks, topology, case.student.vocab, weights)
    return {name: value / case.loss_scale for name, value in gradients.items()}


def plain_step(data_iterator: Iterator[Mapping[str, Tensor]], model: GPTModel) -> Any:
    batch = get_batch(data_iterator, "cpu")
    output = model(batch.tokens_BS, batch.position_ids_BS, batch.attention_mask, labels=batch.labels_BS)

    def loss(losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return (losses_BS * batch.loss_mask_BS).sum(), batch.loss_mask_BS.sum().int(), {}

    return output, loss


@pytest.mark.tier("default")
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({}, (("moe_z_loss_coeff", 0.02),)),
        ({"pp": 2, "loss_scale": 64.0}, (("moe_z_loss_coeff", 0.02),)),
        ({"dp": 2, "ep": 2}, (("moe_router_load_balancing_type", "seq_aux_loss"),)),
        ({"pp": 2}, (("moe_router_load_balancing_type", "global_aux_loss"),)),
    ],
    ids=["z-loss", "z-loss-pp2-scaled", "seq-ep2", "global-pp2"],
)
def test_router_losses_are_those_of_plain_megatron(
    layout: dict[str, Any], options: tuple[tuple[str, Any], ...]
) -> None:
    case = Case(terms=ONLY_CE, student=WHOLE_VOCABULARY, teacher=ITS_TEACHER, recompute=options, **layout)
    unbalanced = replace(case, student=replace(WHOLE_VOCABULARY, aux_loss=0.0), recompute=())
    plain, *_ = run_on_ranks(plain_gradients, case.layout, {"case": case})
    without, *_ = run_on_ranks(plain_gradients, case.layout, {"case": unbalanced})
    ours, *_ = run_on_ranks(run_step, case.layout, {"case": case})
    assert set(ours.gradients) == set(plain)
    for name, gradient in plain.items():
        assert relative(ours.gradients[name] - gradient, gradient) < 1e-5, name
    router = "decoder.layers.0.mlp.router.weight"
    assert relative(plain[router] - without[router], plain[router]) > 1e-3  # the balancing loss has an effect


QWEN3_30B_A3B = Namespace(
    num_layers=48, hidden_size=2048, num_attention_heads=32, num_query_groups=4, group_query_attention=True,
    kv_channels=128, swiglu=True, padded_vocab_size=151936, untie_embeddings_and_output_weights=True,
    ffn_hidden_size=6144, num_experts=128, moe_ffn_hidden_size=768, moe_router_topk=8, moe_layer_freq=1,
    moe_shared_expert_intermediate_size=None, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
    expert_tensor_parallel_size=None, expert_model_parallel_size=1, attention_output_gate=False, seq_length=4096,
)  # fmt: skip


def changed(args: Namespace, **changes: object) -> Namespace:
    return Namespace(**(vars(args) | changes))


def test_a_known_model_has_its_published_size() -> None:
    assert held_parameters(QWEN3_30B_A3B) == pytest.approx(30.5e9, rel=2e-3)
    # 3.3 billion are active, as in a dense model with the width that a token passes.
    dense = changed(
        QWEN3_30B_A3B, num_experts=None, ffn_hidden_size=ModelShape.of_args(QWEN3_30B_A3B).active_ffn
    )
    assert held_parameters(dense) == pytest.approx(3.3e9, rel=2e-2)


def test_widths_of_mixed_layers() -> None:
    deepseek = changed(
        QWEN3_30B_A3B,
        num_layers=27,
        ffn_hidden_size=10944,
        moe_layer_freq=[0] + [1] * 26,
        moe_ffn_hidden_size=1408,
        moe_router_topk=6,
        moe_shared_expert_intermediate_size=2816,
    )
    assert ModelShape.of_args(deepseek).active_ffn == (10944 + 26 * (6 * 1408 + 2816)) // 27
    every_second = changed(QWEN3_30B_A3B, num_layers=5, moe_layer_freq=2, ffn_hidden_size=100)
    assert ModelShape.of_args(every_second).active_ffn == (3 * 8 * 768 + 2 * 100) // 5


SHARED_WIDTH, PATTERN = 20, [0, 1, 1, 0, 1, 1]


def count_matrices() -> int:
    """Return, on every rank, how many numbers the matrices of this rank's model hold."""
    topology = Topology.from_megatron(sequence_parallel=False)
    options = {"moe_shared_expert_intermediate_size": SHARED_WIDTH, "moe_layer_freq": PATTERN}
    model = build_stage(model_config(STUDENT_EXPERTS, topology, torch.float32, **options), topology)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


@pytest.mark.tier("default")
@pytest.mark.parametrize("sizes", [{}, {"dp": 2, "ep": 2}, {"tp": 2, "dp": 2, "ep": 2}])
def test_memory_counts_what_a_rank_holds(sizes: dict[str, int]) -> None:
    shape, tensor = STUDENT_EXPERTS, sizes.get("tp", 1)
    topology = Namespace(tensor_size=tensor)
    args = changed(
        QWEN3_30B_A3B,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_width,
        padded_vocab_size=padded_vocab(shape, topology),  # type: ignore[arg-type]
        ffn_hidden_size=shape.ffn,
        num_experts=shape.experts,
        moe_ffn_hidden_size=shape.ffn,
        moe_layer_freq=PATTERN,
        moe_shared_expert_intermediate_size=SHARED_WIDTH,
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=sizes.get("ep", 1),
    )
    for held in run_on_ranks(count_matrices, Layout(**sizes)):
        assert held == held_parameters(args)


RUN = Namespace(
    padded_vocab_size=128, pipeline_model_parallel_size=1, expert_model_parallel_size=2, num_experts=8,
    moe_ffn_hidden_size=16, moe_layer_freq=[0, 1], moe_shared_expert_intermediate_size=16, moe_grouped_gemm=True,
    moe_router_load_balancing_type="aux_loss", moe_token_dispatcher_type="allgather", transformer_impl="local",
    teacher_fp8_format=None, teacher_fp8_recipe="tensorwise",
)  # fmt: skip


def test_a_dense_teacher_inherits_no_experts() -> None:
    teacher = teacher_args(Namespace(num_layers=2), RUN)
    assert (teacher.num_experts, teacher.expert_model_parallel_size) == (None, 1)
    assert (teacher.moe_ffn_hidden_size, teacher.moe_layer_freq) == (None, 1)
    # This passes, so that a later check can name the mistake.
    assert teacher_args(Namespace(num_layers=2), RUN, expert_size=2).expert_model_parallel_size == 2


def test_a_teacher_of_experts_routes_as_its_checkpoint_and_balances_nothing() -> None:
    stored = Namespace(
        num_layers=2,
        num_experts=6,
        moe_layer_freq=1,
        moe_aux_loss_coeff=[0.1, 0.2],
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"],
        moe_z_loss_coeff=0.1,
        moe_input_jitter_eps=0.1,
        moe_router_force_load_balancing=True,
        expert_model_parallel_size=8,
    )
    teacher = teacher_args(stored, RUN)
    assert (teacher.num_experts, teacher.moe_layer_freq, teacher.expert_model_parallel_size) == (6, 1, 2)
    assert (teacher.moe_aux_loss_coeff, teacher.moe_z_loss_coeff, teacher.moe_input_jitter_eps) == (
        0.0,
        None,
        None,
    )
    assert teacher.moe_router_load_balancing_type == "none"
    assert teacher.moe_token_dispatcher_type == "alltoall"
    assert not teacher.moe_router_force_load_balancing
    assert not teacher.moe_grouped_gemm
    stored.moe_router_load_balancing_type = "sinkhorn"
    assert teacher_args(stored, RUN, expert_size=1).moe_router_load_balancing_type == "sinkhorn"
    assert teacher_args(stored, RUN, expert_size=1).expert_model_parallel_size == 1
