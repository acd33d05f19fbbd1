"""The central promise: every loss term and every gradient is the same at every layout, and right.

Each case runs the package's own forward step through Megatron's schedule and DDP, and compares with the plain
float64 reference of tests/reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_fdd.arguments import chunk_layers
from megatron_fdd.config import FddConfig
from megatron_fdd.distill import connect
from megatron_fdd.layer_plan import LayerPair, Plan
from megatron_fdd.schedule import DistillationSteps
from megatron_fdd.topology import Topology
from tests import reference
from tests.models import build_frozen, build_student, full_gradients, padded_vocab
from tests.ranks import Layout, run_on_ranks
from tests.reference import STUDENT, TEACHER, Shape, Terms, Weights

MICRO_BATCHES, MICRO_BATCH, LENGTH = 4, reference.MICRO_BATCH, 12
# design.md, section 5.
TERM_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One way to compute the same thing."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    dp: int = 1
    ep: int = 1
    teacher_ep: int = 1
    sequence_parallel: bool = False
    terms: Terms = Terms()
    student: Shape = STUDENT
    teacher: Shape = TEACHER
    recompute: tuple[tuple[str, Any], ...] = ()
    bf16: bool = False
    loss_scale: float = 1.0
    micro_batches: int = MICRO_BATCHES
    packed: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(tp=self.tp, pp=self.pp, cp=self.cp, dp=self.dp, ep=self.ep, vpp=self.vpp)


@dataclass(frozen=True)
class Result:
    """What one step gave: token means and full gradients, in float64."""

    means: dict[str, float]
    gradients: Weights


def fdd_config(terms: Terms) -> FddConfig:
    return FddConfig(
        teacher_load="given",
        layer_pairs=terms.pairs,
        alpha=terms.alpha,
        beta=terms.beta,
        kd_weight=terms.kd,
        ce_weight=terms.ce,
        kd_divergence=terms.kd_kind,
        trajectory_divergence=terms.trajectory_kind,
        divergence_mix=terms.mix,
        temperature=terms.temperature,
        lens_norm="final" if terms.lens_norm else "none",
        lens_head="live" if terms.live else "detached",
        delta="centred" if terms.centred else "logprob",
        delta_detach_previous=terms.detach_previous,
        tokens="all" if terms.all_tokens else "labels",
    )


def join(
    case: Case, ddp: dict[str, Any] | None = None
) -> tuple[list[torch.nn.Module], GPTModel, DistillationSteps]:
    """On every rank: the student's chunks, the teacher, and what Megatron's schedule runs of both."""
    topology = Topology.from_megatron(sequence_parallel=case.sequence_parallel)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    config = fdd_config(case.terms)
    options = dict(case.recompute)
    if case.loss_scale != 1.0:
        options["grad_scale_func"] = lambda loss: loss * case.loss_scale
    student_weights = reference.random_weights(case.student, 1)
    chunks = build_student(
        case.student, student_weights, topology, dtype, ddp=ddp, virtual=case.vpp, **options
    )
    teacher_weights = reference.random_weights(case.teacher, 2)
    own_experts = topology.with_experts(case.teacher_ep)
    teacher = build_frozen(case.teacher, teacher_weights, own_experts, dtype, padded_like=case.student)
    pairs = tuple(LayerPair(*pair) for pair in case.terms.pairs) if config.uses_taps else ()
    plan = Plan(
        config,
        pairs,
        num_stages=topology.num_stages,
        student_layers=chunk_layers(unwrap_model(chunks)[0].config),
        teacher_layers=chunk_layers(teacher.config),
        vocab_size=shard_vocab(case),
        padded_vocab_size=padded_vocab(case.student, topology),
    )
    return chunks, teacher, connect(plan, unwrap_model(chunks), teacher, topology)


def schedule_step(
    case: Case, chunks: list[torch.nn.Module], steps: DistillationSteps
) -> list[dict[str, Tensor]]:
    """Forward and backward of this rank's share of the batches; gradients are zero before."""
    mine = case_batches(case)[parallel_state.get_data_parallel_rank() :: case.dp]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    return steps.run(
        get_forward_backward_func(),
        forward_step_func=steps.forward_step,
        data_iterator=iter(mine) if case.vpp is None else [iter(mine) for _ in chunks],
        model=chunks,
        num_microbatches=len(mine),
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )


def run_step(case: Case) -> Result:
    """Body on every rank: one training step's forward and backward passes."""
    chunks, teacher, steps = join(case)
    means = schedule_step(case, chunks, steps)
    topology = Topology.from_megatron(sequence_parallel=case.sequence_parallel)
    weights = reference.random_weights(case.student, 1)
    gradients = full_gradients(chunks, topology, case.student.vocab, weights)
    assert not any(parameter.grad is not None for parameter in teacher.parameters())
    return Result(
        {name: value.item() for name, value in means[0].items()} if means else {},
        {name: value / case.loss_scale for name, value in gradients.items()},
    )


def case_batches(case: Case) -> list[dict[str, Tensor]]:
    batches = reference.random_batches(case.micro_batches, MICRO_BATCH, LENGTH, shard_vocab(case))
    return reference.packed(batches) if case.packed else batches


def shard_vocab(case: Case) -> int:
    return min(case.student.vocab, case.teacher.vocab)


def expected(case: Case) -> Result:
    """The float64 reference on all tokens at once."""
    student = reference.double(reference.random_weights(case.student, 1), requires_grad=True)
    teacher = reference.double(reference.random_weights(case.teacher, 2), requires_grad=False)
    batches = case_batches(case)
    total, means = reference.distillation_loss(
        case.terms, (case.student, case.teacher), (student, teacher), reference.stacked(batches)
    )
    total.backward()
    zero = {name: torch.zeros_like(value) for name, value in student.items()}
    return Result(means, {name: zero[name] if w.grad is None else w.grad for name, w in student.items()})


def relative(difference: Tensor, value: Tensor) -> float:
    return float(difference.norm() / value.norm().clamp(min=1e-12))


def assert_equal(result: Result, wanted: Result) -> None:
    for name, value in result.means.items():
        if name in wanted.means:
            assert value == pytest.approx(wanted.means[name], rel=TERM_TOLERANCE, abs=TERM_TOLERANCE), name
    assert set(result.gradients) == set(wanted.gradients)
    for name, gradient in result.gradients.items():
        error = relative(gradient - wanted.gradients[name], wanted.gradients[name])
        assert error <= GRADIENT_TOLERANCE, f"{name}: gradient off by {error:.1e} of its norm"


TIED = replace(STUDENT, tied=True)
OTHER_VOCABULARY = replace(TEACHER, vocab=47)
EVERYTHING = Terms(ce=0.5, kd=0.7, alpha=1.3, beta=0.9)

FULL_BLOCK = (("recompute_granularity", "full"), ("recompute_method", "block"), ("recompute_num_layers", 3))
FULL_UNIFORM = (
    ("recompute_granularity", "full"),
    ("recompute_method", "uniform"),
    ("recompute_num_layers", 1),
)
SELECTIVE = (("recompute_granularity", "selective"),)
# Taps on the first and the last layer of a stage, and stages without one: 6 layers are 2+2+1+1 at pp4.
SPREAD = Terms(pairs=((1, 1), (5, 9)))
ENDS = Terms(pairs=((2, 3), (3, 5), (6, 10)))
PIPELINES = {
    "pp2": Case(pp=2),
    "pp3": Case(pp=3, micro_batches=5),
    "pp4": Case(pp=4, micro_batches=6),
    "pp4-far-apart": Case(pp=4, terms=SPREAD),
    "pp4-ends": Case(pp=4, terms=ENDS),
    "pp4-early-taps": Case(pp=4, terms=Terms(pairs=((1, 1), (2, 2)))),
    "pp2-tp2": Case(tp=2, pp=2),
    "pp2-tp2-sp": Case(tp=2, pp=2, sequence_parallel=True),
    "pp2-dp2": Case(pp=2, dp=2),
    "pp2-tied": Case(pp=2, student=replace(STUDENT, tied=True), teacher=replace(TEACHER, tied=True)),
    "pp2-full-block": Case(pp=2, recompute=FULL_BLOCK),
    "pp2-full-uniform": Case(pp=2, recompute=FULL_UNIFORM),
    "pp2-loss-scale": Case(pp=2, loss_scale=128.0),
    "pp2-vpp3": Case(pp=2, vpp=3),
    "pp2-vpp2-ends": Case(pp=2, vpp=2, terms=ENDS),
    "pp2-vpp2-tp2-sp": Case(tp=2, pp=2, vpp=2, sequence_parallel=True),
    "pp2-vpp2-dp2": Case(pp=2, vpp=2, dp=2, micro_batches=8),
    "pp2-vpp3-far-apart": Case(pp=2, vpp=3, terms=SPREAD),
    "pp2-vpp2-no-delta": Case(pp=2, vpp=2, terms=Terms(beta=0.0)),
    "pp4-vpp2": Case(
        pp=4,
        vpp=2,
        micro_batches=8,
        student=replace(STUDENT, num_layers=8),
        terms=Terms(pairs=((2, 2), (3, 6), (7, 9))),
    ),
    "pp2-live-tied": Case(pp=2, student=replace(STUDENT, tied=True), terms=Terms(live=True)),
    "pp2-live-tp2-sp": Case(tp=2, pp=2, sequence_parallel=True, terms=Terms(live=True)),
    "pp2-live-dp2": Case(pp=2, dp=2, terms=Terms(live=True)),
    "pp2-live-scale": Case(pp=2, loss_scale=128.0, terms=Terms(live=True, lens_norm=False)),
    "pp2-vpp3-live": Case(pp=2, vpp=3, terms=Terms(live=True)),
    "pp4-live-no-head-loss": Case(pp=4, terms=Terms(live=True, kd=0.0)),
    "pp4-nothing-at-the-end": Case(pp=4, terms=Terms(kd=0.0)),
    "pp4-all-weights-0": Case(pp=4, terms=Terms(kd=0.0, alpha=0.0, beta=0.0)),
}

CONTEXTS = {
    "cp2": Case(cp=2),
    "cp3": Case(cp=3),
    "tp2-cp2": Case(tp=2, cp=2),
    "tp2-cp2-sp": Case(tp=2, cp=2, sequence_parallel=True),
    "pp2-cp2": Case(pp=2, cp=2),
    "pp2-vpp3-cp2": Case(pp=2, vpp=3, cp=2),
    "cp2-dp2": Case(cp=2, dp=2),
    "cp2-full-uniform": Case(cp=2, recompute=FULL_UNIFORM),
    "cp2-selective": Case(cp=2, recompute=SELECTIVE),
    "pp2-cp2-live": Case(pp=2, cp=2, terms=Terms(live=True)),
    "cp2-all-tokens": Case(cp=2, terms=Terms(all_tokens=True, ce=0.5)),
    "packed": Case(packed=True),
    "packed-tp2-sp": Case(packed=True, tp=2, sequence_parallel=True),
    "packed-pp2": Case(packed=True, pp=2),
    "packed-pp2-vpp3": Case(packed=True, pp=2, vpp=3),
    "packed-tp2-pp2-sp": Case(packed=True, tp=2, pp=2, sequence_parallel=True),
    "packed-dp2": Case(packed=True, dp=2),
    "packed-full-block": Case(packed=True, recompute=FULL_BLOCK),
    "packed-selective": Case(packed=True, recompute=SELECTIVE),
}

LAYOUTS = (
    PIPELINES
    | CONTEXTS
    | {
        "1x1": Case(),
        "tp2": Case(tp=2),
        "tp3": Case(tp=3),
        "tp4": Case(tp=4),
        "tp2-sp": Case(tp=2, sequence_parallel=True),
        "tp3-sp": Case(tp=3, sequence_parallel=True),
        "tp4-sp": Case(tp=4, sequence_parallel=True),
        "dp2": Case(dp=2),
        "tp2-dp2": Case(tp=2, dp=2),
        "tp2-dp2-sp": Case(tp=2, dp=2, sequence_parallel=True),
        "full-block": Case(recompute=FULL_BLOCK),
        "full-uniform": Case(recompute=FULL_UNIFORM),
        "selective-tp2-sp": Case(tp=2, sequence_parallel=True, recompute=SELECTIVE),
        "full-uniform-tp2-sp": Case(tp=2, sequence_parallel=True, recompute=FULL_UNIFORM),
        "loss-scale": Case(tp=2, loss_scale=128.0),
        "tied": Case(tp=2, student=TIED),
        "tied-both": Case(tp=2, sequence_parallel=True, student=TIED, teacher=replace(TEACHER, tied=True)),
        # 50 tokens in 4 slices of 52 rows would leave 2 in the last; 9 tokens leave whole slices empty.
        "empty-slices": Case(tp=4, student=replace(STUDENT, vocab=9), teacher=replace(TEACHER, vocab=9)),
        "teacher-lacks-added-tokens": Case(tp=2, teacher=OTHER_VOCABULARY),
    }
)

OPTIONS = {
    "everything": EVERYTHING,
    "rkl-jsd": Terms(kd_kind="rkl", trajectory_kind="jsd"),
    "sfkl-srkl-hot": Terms(kd_kind="sfkl", trajectory_kind="srkl", temperature=2.0, mix=0.3),
    "hot-fkl": Terms(temperature=2.0, ce=0.5),
    "no-norm": Terms(lens_norm=False),
    "live": Terms(live=True),
    "live-centred": Terms(live=True, centred=True),
    "centred": Terms(centred=True),
    "detach-previous": Terms(detach_previous=True),
    "detach-previous-centred": Terms(detach_previous=True, centred=True),
    "all-tokens": Terms(all_tokens=True, ce=0.5),
    "only-delta": Terms(alpha=0.0, kd=0.0),
    "only-trajectory": Terms(beta=0.0, kd=0.0),
    "only-kd": Terms(alpha=0.0, beta=0.0),
    "only-ce": Terms(alpha=0.0, beta=0.0, kd=0.0, ce=1.0),
    "first-and-last": Terms(pairs=((1, 1), (6, 10))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_terms_and_gradients_do_not_depend_on_the_layout(name: str) -> None:
    case = LAYOUTS[name]
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_works_across_stages(name: str) -> None:
    case = Case(pp=3, terms=OPTIONS[name])
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_the_reference(name: str, sequence_parallel: bool) -> None:
    case = Case(tp=2, sequence_parallel=sequence_parallel, terms=OPTIONS[name])
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)
