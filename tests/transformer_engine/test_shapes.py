"""The check before an FP8 run: it refuses exactly the shapes that TransformerEngine refuses in the first step."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from megatron_fdd.host.role import Role
from megatron_fdd.plan.context import Model
from megatron_fdd.plan.fp8 import check_fp8_shapes
from tests.harness.ranks import run_on_ranks
from tests.oracle.case import MICRO_BATCH, Case, join, schedule_step
from tests.oracle.reference import Shape, Terms
from tests.transformer_engine import IMAGE, needs_python

pytestmark = needs_python

FITS = Shape(num_layers=1, hidden=32, heads=8, groups=8, head_width=4, ffn=32)
CASE = Case(
    student=FITS, teacher=FITS, length=16, micro_batches=1, terms=Terms(alpha=0, beta=0),
    transformer_impl="transformer_engine",
)  # fmt: skip
SP = {"tp": 2, "sequence_parallel": True}
# Each row: changes of the case; of the model; the message for the student; for the teacher. A micro-batch has two
# sequences.
CASES = {
    "fits": ({}, {}, None, None),
    "24 tokens": ({"length": 12}, {}, "24 tokens of a micro-batch on a rank (of 16)", None),
    "20 tokens": ({"length": 10}, {}, "20 tokens of a micro-batch on a rank (of 16)", "20 tokens"),
    "24 packed tokens": ({"length": 12, "packed": True}, {}, "24 tokens", None),
    "cut sequence": ({"length": 24, "cp": 2}, {}, "24 tokens of a micro-batch on a rank (of 16)", None),
    "tp2": ({"length": 12, "tp": 2}, {}, "24 tokens of a micro-batch on a rank (of 16)", None),
    "sp": ({"length": 8, **SP}, {}, None, None),
    "sp, 4 tokens": ({"length": 4, **SP}, {}, "4 tokens of a micro-batch on a sequence-parallel", "4 tokens"),
    "sp, 12 tokens": ({"length": 12, **SP}, {}, "12 tokens of a micro-batch on a sequence-p", "12 tokens"),
    "hidden": ({}, {"hidden": 40}, "hidden size 40 (of 16)", "hidden size 40 (of 16)"),
    "heads": ({}, {"heads": 6, "groups": 6}, "attention width / tensor parallel 1 24 (of 16)", "attention width"),
    "heads, cut": ({"tp": 2}, {"heads": 4, "groups": 4}, "attention width / tensor parallel 2 8", "attention width"),
    "queries, keys, values": ({}, {"groups": 1}, "values / tensor parallel 1 40 (of 16)", None),
    "odd queries, keys, values": (
        {}, {"heads": 16, "groups": 1, "head_width": 2}, "values / tensor parallel 1 36", "1 36 (of 8)"
    ),
    "values, cut": ({"tp": 2}, {"groups": 2}, "values / tensor parallel 2 24 (of 16)", None),
    "feed-forward": ({}, {"ffn": 40}, "feed-forward width / tensor parallel 1 40 (of 16)", "feed-forward"),
    "experts": ({}, {"experts": 4}, None, None),
    "experts' width": ({}, {"experts": 4, "ffn": 40}, "width / expert tensor parallel 1 40 (of 16)", "experts' width"),
    "feed-forward, cut": ({"tp": 2}, {"ffn": 48}, "feed-forward width / tensor parallel 2 24", "feed-forw"),
}  # fmt: skip
# MXFP8 needs multiples of 32 everywhere, also in a frozen model: one message for both models.
WIDE = {"heads": 16, "groups": 16, "ffn": 64}
MX_CASES = {
    "fits": ({}, {}, None),
    "48 tokens": ({"length": 24}, {}, "48 tokens of a micro-batch on a rank (of 32)"),
    "48 packed tokens": ({"length": 24, "packed": True}, {}, "48 tokens"),
    "cut sequence": ({"length": 48, "cp": 2}, {}, "48 tokens of a micro-batch on a rank (of 32)"),
    "tp2": ({"tp": 2}, WIDE, None),
    "sp": ({"length": 32, **SP}, WIDE, None),
    "sp, 16 tokens": (SP, WIDE, "16 tokens of a micro-batch on a sequence-parallel rank (of 32)"),
    "hidden": ({}, {"hidden": 48}, "hidden size 48 (of 32)"),
    "heads": ({}, {"heads": 12, "groups": 2}, "attention width / tensor parallel 1 48 (of 32)"),
    "queries, keys, values": ({}, {"groups": 2}, "keys and values / tensor parallel 1 48 (of 32)"),
    "feed-forward": ({}, {"ffn": 48}, "feed-forward width / tensor parallel 1 48 (of 32)"),
    "feed-forward, cut": ({"tp": 2}, {**WIDE, "ffn": 96}, "feed-forward width / tensor parallel 2 48 (of 32)"),
    "experts": ({}, {"experts": 4}, None),
    "experts' width": ({}, {"experts": 4, "ffn": 48}, "experts' width / expert tensor parallel 1 48 (of 32)"),
}  # fmt: skip


def arguments(case: Case, shape: Shape, recipe: str) -> Namespace:
    """Return the arguments of Megatron that the check reads."""
    return Namespace(
        fp8="hybrid", fp8_recipe=recipe, first_last_layers_bf16=False, seq_length=case.length,
        micro_batch_size=MICRO_BATCH, tensor_model_parallel_size=case.tp, context_parallel_size=case.cp,
        sequence_parallel=case.sequence_parallel, num_layers=shape.num_layers, hidden_size=shape.hidden,
        num_attention_heads=shape.heads, kv_channels=shape.head_width, group_query_attention=True,
        num_query_groups=shape.groups, ffn_hidden_size=shape.ffn, num_experts=shape.experts,
        multi_latent_attention=False, attention_output_gate=False, moe_layer_freq=1, moe_ffn_hidden_size=shape.ffn,
        moe_latent_size=None, moe_shared_expert_intermediate_size=None, expert_tensor_parallel_size=None,
        pipeline_model_parallel_size=case.pp, expert_model_parallel_size=case.ep, swiglu=True, moe_router_topk=2,
    )  # fmt: skip


def refusal_of_the_check(case: Case, recipe: str, role: Role) -> str | None:
    shape = case.student if role is Role.STUDENT else case.teacher
    try:
        check_fp8_shapes(Model(role, arguments(case, shape, recipe), None))
    except ValueError as error:
        return str(error)
    return None


def refusal_in_a_step(case: Case) -> str | None:
    """Return, on every rank, the error of TransformerEngine or a kernel, in one step or already for the weights."""
    try:
        chunks, _, steps = join(case)
        schedule_step(case, chunks, steps)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("role", "recipe"),
    [(Role.STUDENT, "tensorwise"), (Role.STUDENT, "blockwise"), (Role.TEACHER, "tensorwise")],
)
@pytest.mark.parametrize("name", CASES)
def test_the_check_refuses_what_transformer_engine_refuses(name: str, recipe: str, role: Role) -> None:
    layout, changes, *wanted = CASES[name]
    assert_both_refuse(layout, changes, wanted[role is Role.TEACHER], recipe, role)


# For (role, recipe), the recipe with the same rule.
SAME_RULE = {(Role.STUDENT, "delayed"): "tensorwise", (Role.TEACHER, "blockwise"): "tensorwise"}


@pytest.mark.parametrize(("role", "recipe"), SAME_RULE)
def test_recipes_with_the_same_rule(role: Role, recipe: str) -> None:
    """The check says the same in every case; a step agrees in one that fits, and wherever a rule refuses."""
    for layout, changes, *_ in CASES.values():
        case = replace(CASE, **layout, **{role.value: replace(FITS, **changes)})
        told = [refusal_of_the_check(case, each, role) for each in (recipe, SAME_RULE[role, recipe])]
        assert told[0] == (told[1] and told[1].replace(SAME_RULE[role, recipe], recipe))
    for name in ("fits", "20 tokens", "hidden", "odd queries, keys, values"):
        layout, changes, *wanted = CASES[name]
        assert_both_refuse(layout, changes, wanted[role is Role.TEACHER], recipe, role)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("name", MX_CASES)
def test_the_check_refuses_what_mxfp8_cannot_hold(name: str, role: Role) -> None:
    assert_both_refuse(*MX_CASES[name], "mxfp8", role)


def assert_both_refuse(
    layout: dict[str, Any], changes: dict[str, Any], said: str | None, recipe: str, role: Role
) -> None:
    """Assert that the check refuses with `said`, and a step with any message; or neither if `said` is empty."""
    case = replace(CASE, **layout, **{role.value: replace(FITS, **changes)})
    refused = refusal_of_the_check(case, recipe, role)
    assert refused is None if said is None else refused is not None and said in refused
    for grouped in (False, True) if "experts" in changes else (False,):
        options = (("fp8", "hybrid"), ("fp8_recipe", recipe), ("moe_grouped_gemm", grouped))
        case = replace(case, **{f"{role.value}_options": options})
        for late in run_on_ranks(refusal_in_a_step, case.layout, {"case": case}, image=IMAGE):
            assert (late is None) == (refused is None), late
            assert late is None or "FP8" in late
