"""The flops of a run's units, compared with counted products and with sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.terms import needs_of
from megatron_fdd.ops.capped_cosine import capped_cosine
from megatron_fdd.ops.delta import capped_change, head_grams
from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.ops.head_loss import LossWeights, head_loss
from megatron_fdd.ops.linear_kl import Divergence, Heads, VocabShard, linear_kl
from megatron_fdd.ops.logit_changes import Ends
from megatron_fdd.plan.flops import (
    capped_change_flops,
    capped_cosine_flops,
    head_loss_flops,
    inner_layer_flops,
    is_computed_at_once,
    layer_flops,
    linear_kl_flops,
    token_flops,
)
from megatron_fdd.plan.model_shape import ModelShape
from tests.ops.inner_case import Inner, leaves_of, make_layers
from tests.oracle.added_term import known
from tests.oracle.model_shapes import (
    GPT2,
    GPT2_XL,
    LLAMA2_13B,
    LLAMA3_8B,
    LLAMA3_70B,
    QWEN3_2B,
    QWEN3_32B,
    SMOLLM2,
    TINY_LLAMA,
)

FDD = FddConfig(teacher_load="somewhere")
STUDENT = ModelShape(5, 1, 1, 1, 1, vocab=100, gated=True, seq_length=0)
TEACHER = ModelShape(7, 1, 1, 1, 1, vocab=100, gated=True, seq_length=0)


@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [
        (GPT2, GPT2_XL, 7.4),
        (SMOLLM2, SMOLLM2, 8.0),
        (QWEN3_2B, QWEN3_32B, 9.3),
        (TINY_LLAMA, LLAMA2_13B, 2.2),
        (LLAMA3_8B, LLAMA3_70B, 3.2),
    ],
)
def test_a_tap_weighs_several_student_layers(student: ModelShape, teacher: ModelShape, layers: float) -> None:
    flops = token_flops(student, teacher, FDD)
    assert flops.tap / flops.layer == pytest.approx(layers, abs=0.05)


def test_a_layer_by_hand() -> None:
    shape = ModelShape(8, 20, heads=4, groups=2, head_width=3, vocab=9, gated=True, seq_length=10)
    qkv, projection, feed_forward = 8 * (12 + 6 + 6), 12 * 8, 3 * 8 * 20
    scores_and_values = 2 * 12 * (10 / 2)  # the average token sees half the sequence
    assert layer_flops(shape) == 2 * (qkv + projection + feed_forward + scores_and_values)


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("divergence", [None, "fkl", "rkl", "jsd"])
def test_head_flops_are_those_of_the_products_done(divergence: str | None, trains_head: bool) -> None:
    tokens, vocab, teacher_width, student_width = 3, 11, 7, 5
    teacher_head_WT, teacher_NT = torch.randn(vocab, teacher_width), torch.randn(tokens, teacher_width)
    student_head_WD = torch.randn(vocab, student_width, requires_grad=trains_head)
    student_ND = torch.randn(tokens, student_width, requires_grad=True)
    in_place = {torch.ops.aten.addmm_: lambda out, left, right, **_: mm_flop(left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        heads = Heads(teacher_head_WT, student_head_WD, VocabShard(0, vocab, None))
        result = linear_kl(teacher_NT, student_ND, heads, divergence=divergence and Divergence(divergence))
        outputs = (result.divergence_N, result.student_lse_N)
        torch.stack([output.sum() for output in outputs if output is not None]).sum().backward()
    teacher = ModelShape(teacher_width, 1, 1, 1, 1, vocab, gated=True, seq_length=0)
    student = ModelShape(student_width, 1, 1, 1, 1, vocab, gated=True, seq_length=0)
    expected = tokens * linear_kl_flops(student, teacher, divergence, trains_head=trains_head)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("divergence", [None, "fkl", "jsd"])
def test_flops_of_a_summed_loss_are_those_of_the_products_done(
    divergence: str | None, trains_head: bool
) -> None:
    tokens, vocab, teacher_width, student_width = 3, 11, 7, 5
    teacher_NT, teacher_head_WT = torch.randn(tokens, teacher_width), torch.randn(vocab, teacher_width)
    head_WD = torch.randn(vocab, student_width, requires_grad=trains_head)
    student_ND = torch.randn(tokens, student_width, requires_grad=True)
    ones = torch.ones(tokens)
    in_place = {torch.ops.aten.addmm_: lambda out, left, right, **_: mm_flop(left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        result = head_loss(
            teacher_NT, student_ND, Heads(teacher_head_WT, head_WD, VocabShard(0, vocab, None)),
            divergence=divergence and Divergence(divergence),
            labels_N=torch.zeros(tokens, dtype=torch.int64), weights=LossWeights(ones, ones, 1.0, 1.0),
        )  # fmt: skip
        result.loss.backward()
    teacher_shape = ModelShape(teacher_width, 1, 1, 1, 1, vocab, gated=True, seq_length=0)
    student_shape = ModelShape(student_width, 1, 1, 1, 1, vocab, gated=True, seq_length=0)
    expected = head_loss_flops(student_shape, teacher_shape if divergence else None, trains_head=trains_head)
    assert counter.get_total_flops() == tokens * expected


@pytest.mark.parametrize("trains_head", [False, True])
def test_flops_of_a_capped_change_are_those_of_the_products_done(trains_head: bool) -> None:
    tokens, vocab, teacher_width, student_width = 3, 11, 7, 5
    ends = torch.randn(2, tokens, teacher_width)
    head_WD = torch.randn(vocab, student_width, requires_grad=trains_head)
    shard, extras = VocabShard(0, vocab, None), HeadExtras(cap=2.0)
    heads = Heads(torch.randn(vocab, teacher_width), head_WD, shard, teacher_extras=extras)
    grams = head_grams(heads)
    in_place = {torch.ops.aten.addmm_: lambda out, left, right, **_: mm_flop(left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        change = capped_change(*ends, heads, grams)
        if trains_head:
            change.on_student_nD.sum().backward()
    teacher = ModelShape(teacher_width, 1, 1, 1, 1, vocab, gated=True, seq_length=0)
    student = ModelShape(student_width, 1, 1, 1, 1, vocab, gated=True, seq_length=0)
    expected = capped_change_flops(student, teacher, trains_head=trains_head)
    assert counter.get_total_flops() == tokens * expected
    plain, capped = (
        token_flops(student, replace(teacher, is_capped=each), replace(FDD, lens_head="live"))
        for each in (False, True)
    )
    of_live = capped_change_flops(student, teacher, trains_head=True)
    assert capped.tap - plain.tap == round(of_live * 3 / 4), "the first of four pairs has no delta"


@pytest.mark.parametrize("trains_head", [False, True])
def test_flops_of_a_capped_cosine_are_those_of_the_products_done(trains_head: bool) -> None:
    tokens, vocab, teacher_width, student_width = 3, 11, 7, 5
    teacher_ends = Ends(*torch.randn(2, tokens, teacher_width))
    student_ends = Ends(*torch.randn(2, tokens, student_width, requires_grad=True))
    head_WD = torch.randn(vocab, student_width, requires_grad=trains_head)
    shard, extras = VocabShard(0, vocab, None), HeadExtras(cap=2.0)
    heads = Heads(torch.randn(vocab, teacher_width), head_WD, shard, student_extras=extras)
    in_place = {torch.ops.aten.addmm_: lambda out, left, right, **_: mm_flop(left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        capped_cosine(teacher_ends, student_ends, None, heads).sum().backward()
    teacher = ModelShape(teacher_width, 1, 1, 1, 1, vocab, gated=True, seq_length=0)
    student = ModelShape(student_width, 1, 1, 1, 1, vocab, gated=True, seq_length=0)
    expected = capped_cosine_flops(student, teacher, trains_head=trains_head)
    of_means = 2 * 2 * (teacher_width + student_width)  # a product with each head's mean, for both ends
    assert counter.get_total_flops() in (tokens * expected, tokens * (expected + of_means))
    config = replace(FDD, kernels="torch")
    capped = token_flops(replace(student, is_capped=True), teacher, config)
    plain = token_flops(student, teacher, config)
    assert capped.tap - plain.tap == round(capped_cosine_flops(student, teacher, trains_head=False) * 3 / 4)


def test_flops_of_inner_layers_are_those_of_the_products_done() -> None:
    layers, tokens, vocab = 3, 4, 11
    inner = Inner(make_layers(layers, tokens, vocab), Divergence("jsd"), deltas=(None,) * layers)
    heads, students = inner.layers[0].heads(), leaves_of(inner)
    teacher, student = (
        ModelShape(head.shape[1], 1, 1, 1, 1, vocab, gated=True, seq_length=0)
        for head in (heads.teacher_WT, heads.student_WD)
    )
    grams = 2 * vocab * (teacher.hidden**2 + teacher.hidden * student.hidden + student.hidden**2)
    in_place = {torch.ops.aten.addmm_: lambda out, left, right, **_: mm_flop(left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        total, _ = inner.run(heads, students)
        total.backward()
    assert counter.get_total_flops() == layers * tokens * inner_layer_flops(student, teacher) + grams


@pytest.mark.parametrize(
    ("config", "tap", "head"),
    [
        (FddConfig(alpha=0, delta="centred", kd_weight=0, teacher_load="x"), 0, 0),
        (FddConfig(beta=0, kd_weight=0, teacher_load="x"), 2 * (7 + 5) + 2 * 5, 0),
        (FddConfig(beta=0, lens_head="live", kd_weight=0, teacher_load="x"), 4 * (7 + 5) + 4 * 5, 0),
        (FddConfig(alpha=0, kd_weight=0, teacher_load="x"), 2 * (7 + 5) + 2 * 5, 0),
        (FddConfig(lens_head="live", kd_weight=0, teacher_load="x"), 4 * (7 + 5) + 4 * 5, 0),
        (FddConfig(kd_weight=0, teacher_load="x", kernels="torch", sample_tokens=0.5), (24 + 4 * 5) / 2, 0),
        (FddConfig(beta=0, kd_weight=0, teacher_load="x", sample_one_tap=True), (2 * (7 + 5) + 2 * 5) / 4, 0),
        # Three of four steps also need the log-sum-exps of the earlier tap.
        (
            FddConfig(kd_weight=0, teacher_load="x", kernels="torch", sample_one_tap=True, sample_tokens=0.8),
            0.2 * (44 + 0.75 * 34),
            0,
        ),
        (FddConfig(alpha=0, beta=0, teacher_load="x"), 0, 2 * (7 + 5) + 4 * 5),
        (FddConfig(alpha=0, beta=0, kd_weight=0, ce_weight=1), 0, 2 * 5 + 4 * 5),
    ],
)
def test_only_wanted_terms_cost(config: FddConfig, tap: float, head: int) -> None:
    flops = token_flops(STUDENT, TEACHER if needs_of(config).teacher else None, config)
    assert (flops.tap, flops.head, flops.sent_tap) == (round(100 * tap), 100 * head, 0)
    assert flops.layer == 3 * layer_flops(STUDENT)


@pytest.mark.parametrize(
    ("config", "tap", "sent_tap"),
    [
        (FDD, 24 + 2 * 5, 2 * 5),
        (replace(FDD, trajectory_divergence="jsd"), 24 + 2 * 5, 24 + 2 * 5),
        (replace(FDD, kernels="triton", sample_tokens=0.5), 12 + 5, 5),
        (replace(FDD, sample_one_tap=True), (34 + 0.75 * 34) / 4, 10 / 4),
        (replace(FDD, alpha=0.0), 34, 0),
        (replace(FDD, kernels="torch"), 44, 0),
        (replace(FDD, kernels="torch", trajectory_divergence="jsd"), 68, 0),
        (replace(FDD, lens_head="live"), 68, 0),
    ],
)
def test_a_gradient_from_the_forward_pass_costs_one_product(
    config: FddConfig, tap: float, sent_tap: float
) -> None:
    """A tap whose features go on to another chunk has its gradient from the sweeps, with their products."""
    flops = token_flops(STUDENT, TEACHER, config)
    assert (flops.tap, flops.sent_tap) == (round(100 * tap), round(100 * sent_tap))


@pytest.mark.parametrize("capped", ["student", "teacher"])
def test_under_a_soft_cap_there_is_no_gradient_from_the_forward_pass(capped: str) -> None:
    assert not is_computed_at_once(FDD, is_capped=True)
    student, teacher = (
        replace(STUDENT, is_capped=capped == "student"),
        replace(TEACHER, is_capped=capped == "teacher"),
    )
    assert token_flops(student, teacher, FDD) == token_flops(student, teacher, replace(FDD, kernels="torch"))


def test_the_products_of_an_own_term_cost_too() -> None:
    alone = {"alpha": 0, "beta": 0, "kd_weight": 0, "sample_tokens": 0.5, "term": (("learned_mse", 1.0),)}
    with known():
        flops = token_flops(STUDENT, TEACHER, replace(FDD, **alone))
    assert flops.tap == 3 * 2 * 5 * 7 / 2  # forward, and for both inputs backward
