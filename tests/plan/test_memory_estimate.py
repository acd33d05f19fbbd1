"""The dry run's estimate of memory, compared with a calculation by hand (large layout) and a real step (small ones)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.objective import Objective
from megatron_fdd.losses.pairs import plan_pairs
from megatron_fdd.ops.head_grams import StepGrams
from megatron_fdd.plan import describe as dry_run
from megatron_fdd.plan.sizes import student_bytes
from megatron_fdd.step.teacher.pipelined import PipelinedTeacher
from tests.harness.ranks import run_on_ranks
from tests.oracle import case as layouts
from tests.oracle.added_term import known
from tests.oracle.case import LENGTH, MICRO_BATCH, Case, run_step
from tests.oracle.reference import Shape, Terms

MIB = 2**20


def arguments(shape: Shape, case: Case, padded_vocab: int, **more: object) -> argparse.Namespace:
    """Return the arguments of Megatron that the estimate reads."""
    values = {
        "world_size": case.tp * case.pp * case.dp,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": case.tp,
        "data_parallel_size": case.dp,
        "sequence_parallel": case.sequence_parallel,
        "seq_length": LENGTH,
        "micro_batch_size": MICRO_BATCH,
        "global_batch_size": MICRO_BATCH * case.micro_batches,
        "params_dtype": torch.bfloat16 if case.bf16 else torch.float32,
        "padded_vocab_size": padded_vocab,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "group_query_attention": True,
        "kv_channels": shape.head_width,
        "swiglu": True,
        "attention_output_gate": False,
        "num_experts": None,
        "moe_layer_freq": 1,
        "moe_shared_expert_intermediate_size": None,
        "moe_ffn_hidden_size": None,
        "untie_embeddings_and_output_weights": not shape.tied,
        "fp8": None,
        "fp8_recipe": "tensorwise",
        "fp8_param_gather": False,
        "first_last_layers_bf16": False,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
        # Megatron's own estimates read these too.
        "normalization": "RMSNorm",
        "multi_latent_attention": False,
        "mtp_num_layers": None,
        "moe_latent_size": None,
        "add_bias_linear": False,
        "use_distributed_optimizer": True,
        "virtual_pipeline_model_parallel_size": None if case.vpp == 1 else case.vpp,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
    }
    return argparse.Namespace(**values | more)


def estimate(plan: Plan, args: argparse.Namespace, teacher: argparse.Namespace) -> dict[str, int]:
    """Return the dry run's figures in bytes, by their names without numbers."""
    with patch.object(dry_run, "_MIB", 1):
        text = dry_run.describe_plan(plan, args, teacher)
    lines = text.split("estimated memory per rank, MiB:\n")[1].splitlines()
    found = [re.fullmatch(r"    (.+): (\d+)\.0", line) for line in lines]
    return {re.sub(r"\d+ ", "", match[1]): int(match[2]) for match in found if match}


LARGE_TEACHER = Shape(80, 8192, heads=64, groups=8, head_width=128, ffn=28672, vocab=128256)
LARGE_STUDENT = Shape(32, 4096, heads=32, groups=8, head_width=128, ffn=14336, vocab=128256)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_large_layout_by_hand(sequence_parallel: bool) -> None:
    """TP 2 x PP 8 x VPP 4 x DP 4: a 70B teacher of an 8B student, 4,096 tokens, 64 micro-batches a replica."""
    case = Case(tp=2, pp=8, vpp=4, dp=4, sequence_parallel=sequence_parallel, bf16=True)
    size = {"seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 256}
    args = arguments(LARGE_STUDENT, case, 128256, **size)
    teacher = arguments(LARGE_TEACHER, case, 128256, **size)
    config = FddConfig(teacher_load="given")
    plan = Plan(config, plan_pairs(config, 32, 80), 8, (1,) * 32, (10,) * 8, 128256, 128256)
    # Blocks 6, 12, 18 and 24 of the student are on chunks 5, 11, 17 and 23, that is on stages 5, 3, 1 and 7. Each tap
    # except the first needs the teacher's features of the earlier tap, which arrives as a carry.
    assert [sorted(plan.teacher_pairs(stage)) for stage in range(8)] == [
        [], [1, 2], [], [0, 1], [], [0], [], [2, 3]
    ]  # fmt: skip
    rows = 4096 // (2 if sequence_parallel else 1)
    figures = estimate(plan, args, teacher)
    assert figures["student head"] == 128256 // 2 * 4096 * 2 == 501 * MIB
    assert figures["teacher head (with one stage part of its weights)"] == 2 * 501 * MIB
    assert figures["teacher taps, x micro-batch(es)"] == 2 * 64 * rows * 8192 * 2
    assert figures["teacher's final hidden states, micro-batch(es)"] == 64 * rows * 8192 * 2
    assert figures["features of tap(s), both models, float32"] == rows * (8192 + 4096) * 4
    # In an interleaved schedule at most 16 micro-batches of a chunk wait for their backward pass.
    assert figures["gradients kept from the forward pass, on a GPU"] == 16 * 2 * 4096 * 4096 * 4
    assert figures["Gram matrices, float32"] == 4 * (8192**2 + 8192 * 4096 + 4096**2)
    assert figures["Gram matrices in parts for products, on a GPU"] == 4 * (8192**2 + 8192 * 4096 + 4096**2)
    # 2^28 logits of 64,128 columns are those of 32 x 128 tokens; tiles of 4,096 columns are smaller.
    held = 4096 * 64_128
    assert figures["logits of both models that exist at a time, on a GPU, float32"] == 2 * held * 4
    assert figures["placeholder of the head's gradient"] == 64_128 * 4096 * 2
    drawn = estimate(replace(plan, config=replace(config, sample_tokens=0.25)), args, teacher)
    assert drawn["features of tap(s), both models, float32"] == rows // 4 * (8192 + 4096) * 4
    assert drawn["gradients kept from the forward pass, on a GPU"] == 16 * 2 * 1024 * 4096 * 4
    for form, token_bytes in (("fp8", 8192 + 4), ("int8", 8192 + 4 + 8 * (2 + 2) + 12)):
        packed = estimate(replace(plan, config=replace(config, tap_dtype=form)), args, teacher)
        assert packed["teacher taps, x micro-batch(es)"] == 2 * 64 * rows * token_bytes
        assert packed["teacher's final hidden states, micro-batch(es)"] == 64 * rows * 8192 * 2
    # The first stage has 10 layers and the embedding, cut in two, with 2 bytes for each number.
    layer = 8192 * 128 * (2 * 64 + 2 * 8) + 3 * 8192 * 28672
    assert figures["teacher weights"] == 10 * layer + 128256 * 8192


def test_what_a_term_learns_by_hand() -> None:
    """Each of 4 taps on two stages has a projection; Adam's 12 bytes a parameter are spread over 4 replicas."""
    case = Case(tp=2, pp=2, dp=4, bf16=True)
    models = [arguments(shape, case, 128256, global_batch_size=8) for shape in (LARGE_STUDENT, LARGE_TEACHER)]
    with known():
        config = FddConfig(teacher_load="given", term=(("learned_mse", 1.0), ("fixed_mse", 1.0)))
        # Blocks 6 and 12 of the student are on the first stage.
        plan = Plan(config, plan_pairs(config, 32, 80), 2, (16, 16), (40, 40), 128256, 128256)
        with patch("torch.nn.init.orthogonal_"):  # it takes seconds at this size
            figures = estimate(plan, *models)
    assert figures["what terms learn, gradients and optimizer"] == 2 * 4096 * 8192 * (6 + 12 // 4)


def test_weights_in_fp8_by_hand() -> None:
    """The layout is the same without virtual stages; `tests/transformer_engine/test_copies.py` measures real bytes."""
    case = Case(tp=2, pp=8, dp=4, bf16=True)
    config = FddConfig(teacher_load="given")
    plan = Plan(config, plan_pairs(config, 32, 80), 8, (4,) * 8, (10,) * 8, 128256, 128256)
    size = {"global_batch_size": 256}

    def in_fp8(student: dict[str, object], teacher: dict[str, object]) -> dict[str, int]:
        shapes = ((LARGE_STUDENT, student), (LARGE_TEACHER, teacher))
        models = [arguments(shape, case, 128256, **size, **more) for shape, more in shapes]
        figures = estimate(plan, *models)
        found = {name.split()[0]: value for name, value in figures.items() if "FP8" in name}
        elsewhere = ("sum", *(name for name in figures if "taps" in name and "host" in name))
        assert figures["sum"] == sum(value for name, value in figures.items() if name not in elsewhere)
        return found | {"rest": figures["teacher weights"]}

    teacher_layer = (8192 * 128 * (2 * 64 + 2 * 8) + 3 * 8192 * 28672) // 2
    student_layer = (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336) // 2
    embedding = 128256 // 2 * 8192
    rest = {"rest": 2 * embedding}
    in_bf16 = {"rest": 2 * (10 * teacher_layer + embedding)}
    assert in_fp8({}, {}) == in_bf16
    assert in_fp8({"fp8": "hybrid"}, {}) == in_bf16 | {"student": 2 * 4 * student_layer}
    assert in_fp8({}, {"fp8": "e4m3"}) == rest | {"teacher": 10 * teacher_layer}
    mxfp8 = {"fp8": "e4m3", "fp8_recipe": "mxfp8"}
    assert in_fp8({}, mxfp8) == rest | {"teacher": 10 * teacher_layer * 33 // 32}
    ends = {"fp8": "e4m3", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 3}
    of_first_stage = {"teacher": 7 * teacher_layer, "rest": 2 * (3 * teacher_layer + embedding)}
    assert in_fp8({}, ends | {"num_layers_at_end_in_bf16": 1}) == of_first_stage
    of_last_stage = {"teacher": 4 * teacher_layer, "rest": 2 * 6 * teacher_layer}
    assert in_fp8({}, ends | {"num_layers_at_end_in_bf16": 6}) == of_last_stage


def test_the_student_of_a_large_layout_by_hand() -> None:
    """The layout is the same with sequence parallelism and without virtual stages. The student has 8 billion
    parameters; stage 0 holds 4 layers and the embeddings."""
    case = Case(tp=2, pp=8, dp=4, sequence_parallel=True, bf16=True)
    size = {"seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 256}
    selective = arguments(LARGE_STUDENT, case, 128256, **size, recompute_granularity="selective")
    layer = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336
    parameters = (4 * layer + 128256 * 4096) / 2
    weights = "student weights, gradients and optimizer"
    figures = student_bytes(selective, 64, 4)
    assert figures[weights] == pytest.approx(parameters * (2 + 4 + 12 / 4), rel=1e-3)
    # Korthikanti et al. count 34 bytes for each token and unit of width with a plain feed-forward layer, here
    # 18 + 4 ffn / h; 8 micro-batches in flight, with 4 layers each.
    activations = 32 * 4096 * (18 * 4096 + 4 * 14336) / 2
    assert figures["student activations, as Megatron estimates"] == pytest.approx(activations, rel=1e-2)
    uniform = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    inputs = 32 * 4096 // 2 * 4096 * 2
    block = uniform | {"recompute_method": "block"}

    def activations_with(recompute: dict[str, object]) -> int:
        args = arguments(LARGE_STUDENT, case, 128256, **size, **recompute)
        return list(student_bytes(args, 64, 4).values())[1]

    everything = activations_with({})
    assert activations_with(uniform) == pytest.approx(inputs + everything / 32, rel=1e-6)
    assert activations_with(block) == pytest.approx(inputs / 4 + everything * 3 / 4, rel=1e-6)


def test_the_fullest_stage_of_an_uneven_split() -> None:
    """Layers 10, 8, 8, 6 count as if all stages had 10. Ranks that share a sequence share the optimizer's state too."""
    case = Case(pp=4, dp=2, bf16=True)
    args = arguments(LARGE_STUDENT, case, 128256, global_batch_size=32 * MICRO_BATCH)
    even = student_bytes(args, 16, 10)
    assert even == student_bytes(argparse.Namespace(**{**vars(args), "num_layers": 40}), 16, 10)
    config = FddConfig(teacher_load="given")
    plan = Plan(config, plan_pairs(config, 32, 80), 4, (10, 8, 8, 6), (20,) * 4, 128256, 128256)
    found = estimate(plan, args, arguments(LARGE_TEACHER, case, 128256))
    weights = "student weights, gradients and optimizer"
    assert found[weights] == even[weights] > student_bytes(args, 16, 8)[weights]
    shared = argparse.Namespace(**{**vars(args), "context_parallel_size": 2, "data_parallel_size": 1})
    assert student_bytes(shared, 16, 10)[weights] == even[weights]


@pytest.mark.parametrize(
    ("split", "at_once", "sums"),
    [
        ((32,), 4, 0),  # one micro-batch at a time
        # Blocks 6, 12, 18, 24: the tap of stage 0 goes on to the next stage, with four micro-batches.
        ((8, 8, 8, 8), 0, 4),
        ((5, 8, 11, 8), 3, 3),  # two taps on stage 1, with three micro-batches each; the second goes on
    ],
)
def test_taps_that_wait_for_their_backward_pass(split: tuple[int, ...], at_once: int, sums: int) -> None:
    """One gradient in bf16 of a tap, or two sums in float32 where what comes back is not known."""
    case = Case(pp=len(split), bf16=True)
    args = arguments(LARGE_STUDENT, case, 128256, global_batch_size=16 * MICRO_BATCH)
    config = FddConfig(teacher_load="given")
    plan = Plan(
        config, plan_pairs(config, 32, 80), case.pp, split, (80 // case.pp,) * case.pp, 128256, 128256
    )

    def kept(**changes: Any) -> int:
        found = estimate(replace(plan, **changes), args, arguments(LARGE_TEACHER, case, 128256))
        return found["gradients kept from the forward pass, on a GPU"]

    numbers = LENGTH * MICRO_BATCH * 4096
    assert kept() == numbers * (2 * at_once + 2 * 4 * sums)
    taps = {(32,): 4, (8, 8, 8, 8): 4, (5, 8, 11, 8): 6}[split]
    for other in (
        {"config": replace(config, lens_head="live")},
        {"config": replace(config, kernels="torch")},
        {"is_student_capped": True},
        {"is_teacher_capped": True},
    ):
        assert kept(**other) == taps * 2 * numbers * 4


@pytest.mark.parametrize(
    ("case", "left_out"),
    [(Case(bf16=True), ["student head", "teacher head"]), (Case(pp=4, bf16=True), ["teacher taps"])],
)
def test_the_sum_counts_nothing_twice(case: Case, left_out: list[str]) -> None:
    """With one stage the heads are part of the weights; taps in host memory are not on the device."""
    args = arguments(LARGE_STUDENT, case, 128256, global_batch_size=8)
    teacher = arguments(LARGE_TEACHER, case, 128256)
    config = FddConfig(teacher_load="given", offload_teacher_taps=True)
    split = ((32,), (80,)) if case.pp == 1 else ((8,) * 4, (20,) * 4)
    plan = Plan(config, plan_pairs(config, 32, 80), case.pp, *split, 128256, 128256)
    figures = estimate(plan, args, teacher)
    total = figures.pop("sum")
    away = [name for name in figures if any(part in name for part in left_out) or "host" in name]
    assert len(away) == 2
    assert total == sum(size for name, size in figures.items() if name not in away)


def measure(case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """Return, on every rank, what this stage holds after the teacher's run and in its terms; and the estimate."""
    held: dict[str, int] = {}
    plans: list[Plan] = []
    real_run, real_connect = PipelinedTeacher.run, layouts.connect
    real_inner, real_current = Objective.inner, StepGrams.current

    def run(self: PipelinedTeacher, *arguments: Any) -> None:
        real_run(self, *arguments)
        received = [tap for taps in self._received for tap in taps.values()]
        held["teacher taps, x micro-batch(es)"] = num_bytes(received)
        held["teacher's final hidden states, micro-batch(es)"] = num_bytes(self._final)
        assert not any(self._taps)

    def connect(plan: Plan, *rest: Any, **options: Any) -> Any:
        plans.append(plan)
        return real_connect(plan, *rest, **options)

    def inner(self: Objective, taps: Sequence[Tensor], carry: Any, lens: Any, *rest: Any) -> Any:
        held["student head"] = num_bytes([lens.head_WH])
        held["teacher head (with one stage part of its weights)"] = num_bytes([self._teacher_lens.head_WT])
        return real_inner(self, taps, carry, lens, *rest)

    def current(self: StepGrams, heads: Any) -> Any:
        grams = real_current(self, heads)
        held["Gram matrices, float32"] = num_bytes(
            [grams.teacher_teacher_TT, grams.teacher_student_TD, grams.student_student_DD]
        )
        return grams

    with (
        patch.object(PipelinedTeacher, "run", run),
        patch.object(layouts, "connect", connect),
        patch.object(Objective, "inner", inner),
        patch.object(StepGrams, "current", current),
    ):
        run_step(case)
    (plan,) = plans
    shapes = (case.student, case.teacher)
    args, teacher = (arguments(shape, case, plan.padded_vocab_size) for shape in shapes)
    return held, estimate(plan, args, teacher)


def num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


BY_STAGE = Case(pp=4, micro_batches=3)


@pytest.mark.tier("default")
@pytest.mark.parametrize(
    "case",
    [
        BY_STAGE,
        replace(BY_STAGE, pp=2, terms=Terms(pairs=((1, 2), (2, 4), (3, 6), (6, 10)))),
        replace(BY_STAGE, pp=2, tp=2, sequence_parallel=True, bf16=True),
        replace(BY_STAGE, pp=2, vpp=3, micro_batches=4),
    ],
)
def test_the_estimate_is_what_the_fullest_stage_holds(case: Case) -> None:
    results = run_on_ranks(measure, case.layout, {"case": case})
    for name in (
        "teacher taps, x micro-batch(es)",
        "teacher's final hidden states, micro-batch(es)",
        "student head",
        "teacher head (with one stage part of its weights)",
        "Gram matrices, float32",
    ):
        assert max(held.get(name, 0) for held, _ in results) == results[0][1][name], name
