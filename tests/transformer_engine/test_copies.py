"""Weights in FP8: models hold the bytes that the plan counts, beside trained weights and instead of frozen ones."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_fdd.host.model import chunk_layers
from megatron_fdd.plan.fp8 import frozen_weight_bytes, weight_copies_bytes
from tests.harness.ranks import run_on_ranks
from tests.oracle.case import FULL_BLOCK, Case, join, schedule_step
from tests.oracle.reference import Shape, Terms
from tests.transformer_engine import IMAGE, needs_python
from tests.transformer_engine.casts import is_fp8

pytestmark = needs_python

STUDENT = Shape(num_layers=3, hidden=128, heads=8, groups=2, head_width=16, ffn=256)
TEACHER = Shape(num_layers=4, hidden=256, heads=8, groups=8, head_width=32, ffn=384)
CASE = Case(
    student=STUDENT, teacher=TEACHER, length=16, micro_batches=2, terms=Terms(pairs=((1, 2), (2, 3))),
    transformer_impl="transformer_engine",
)  # fmt: skip
BF16_ENDS = (
    ("first_last_layers_bf16", True),
    ("num_layers_at_start_in_bf16", 1),
    ("num_layers_at_end_in_bf16", 1),
)


GROUPED = ("moe_grouped_gemm", True)


def with_experts(case: Case) -> Case:
    student, teacher = (replace(shape, experts=4, ffn=128) for shape in (case.student, case.teacher))
    return replace(case, student=student, teacher=teacher)


def both(recipe: str, *more: tuple[str, object]) -> Case:
    options = (("fp8", "hybrid"), ("fp8_recipe", recipe), *more)
    return replace(CASE, student_options=options, teacher_options=options)


CASES = {
    "tensorwise": both("tensorwise"),
    "delayed": replace(both("delayed"), teacher_options=()),
    "blockwise": both("blockwise"),
    "mxfp8": both("mxfp8"),
    "recompute": replace(both("tensorwise"), recompute=FULL_BLOCK),
    "bf16 ends": both("tensorwise", *BF16_ENDS),
    "tp2-sp": replace(both("blockwise"), tp=2, sequence_parallel=True),
    "pp2": replace(both("tensorwise"), pp=2),
    "experts": with_experts(both("mxfp8")),
    "grouped experts": with_experts(both("blockwise", GROUPED)),
    "ep2-grouped experts": replace(with_experts(both("tensorwise", GROUPED)), dp=2, ep=2, teacher_ep=2),
}


def copies(model: torch.nn.Module) -> list[Tensor]:
    """Return every tensor that the model's modules keep in FP8 beside their weights, scales included."""
    kept = [copy for module in model.modules() for copy in getattr(module, "_fp8_workspaces", {}).values()]
    fields = [value for copy in kept for value in vars(copy).values()]
    return list({value.data_ptr(): value for value in fields if isinstance(value, Tensor)}.values())


def in_fp8(model: torch.nn.Module) -> list[Tensor]:
    """Return the parts of those weights of the model that are in FP8 themselves."""
    weights = [parameter for parameter in model.parameters() if is_fp8(parameter)]
    return [value for weight in weights for value in vars(weight).values() if isinstance(value, Tensor)]


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def step_twice(case: Case) -> tuple[list[int], list[int], bool]:
    """Return, on every rank, bytes of the student's copies and of the teacher's weights, held and estimated; and
    whether copies follow the weights."""
    chunks, teacher, steps = join(case)
    schedule_step(case, chunks, steps)
    (student,) = unwrap_model(chunks)
    before = [copy.clone() for copy in copies(student)]
    with torch.no_grad():
        for parameter in student.decoder.layers.parameters():
            parameter.neg_()
    schedule_step(case, chunks, steps)
    follows = any(not torch.equal(*pair) for pair in zip(copies(student), before, strict=True))
    assert not in_fp8(student)
    assert not copies(teacher)
    arguments = arguments_of(case, student)
    estimated = [weight_copies_bytes(arguments, chunk_layers(student.config))]
    estimated.append(frozen_weight_bytes(arguments_of(case, teacher))[1])
    return [num_bytes(copies(student)), num_bytes(in_fp8(teacher))], estimated, follows


def arguments_of(case: Case, model: torch.nn.Module) -> Namespace:
    config = model.config
    return Namespace(
        fp8=config.fp8, fp8_recipe=config.fp8_recipe, fp8_param_gather=False, num_layers=config.num_layers,
        first_last_layers_bf16=config.first_last_layers_bf16, num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=1, pipeline_model_parallel_size=case.pp, tensor_model_parallel_size=case.tp,
        expert_tensor_parallel_size=None, expert_model_parallel_size=case.ep, hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads, num_query_groups=config.num_query_groups,
        group_query_attention=True, kv_channels=config.kv_channels, ffn_hidden_size=config.ffn_hidden_size,
        seq_length=case.length, attention_output_gate=False, moe_router_topk=config.moe_router_topk,
        swiglu=True, num_experts=config.num_moe_experts, moe_shared_expert_intermediate_size=None,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size, moe_layer_freq=1,
        params_dtype=torch.float32, padded_vocab_size=0, untie_embeddings_and_output_weights=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_plan_counts_what_is_held(name: str) -> None:
    case = CASES[name]
    results = run_on_ranks(step_twice, case.layout, {"case": case}, image=IMAGE)
    estimated = results[0][1]
    for model in (0, 1):
        fullest = max(held[model] for held, _, _ in results)
        assert estimated[model] == pytest.approx(fullest, rel=5e-3)
    assert all(estimated) == bool(case.teacher_options)
    assert all(follows for _, _, follows in results)
