"""One case of the losses (a layout, models, terms), its run through Megatron's schedule, and the expected result."""

from __future__ import annotations

import functools
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

import examples.extend.tuned_lens  # noqa: F401  # adds the lens
from megatron_fdd.config import FddConfig
from megatron_fdd.data.store import taught
from megatron_fdd.data.store.identity import TapForm
from megatron_fdd.data.store.routed import NamedStore
from megatron_fdd.host.model import chunk_layers
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.losses.terms import uses_taps
from megatron_fdd.step.connect import connect
from megatron_fdd.step.schedule import StepHooks
from megatron_fdd.step.teacher.lens_file import TeacherIdentity, write_lens
from megatron_fdd.step.teacher.stored import PlannedStore
from megatron_fdd.step.term_modules import add_term_modules
from megatron_fdd.step.validation import Evaluation
from tests.harness.ranks import Layout
from tests.oracle import reference
from tests.oracle.models import build_frozen, build_student, full_gradients, padded_vocab
from tests.oracle.reference import STUDENT, TEACHER, Shape, Terms, Weights
from tests.oracle.several import TEACHERS_OF_ROWS, second_pairs, second_weights, several_losses
from tests.oracle.stored import remove, taught_batches, write_store

MICRO_BATCHES, MICRO_BATCH, LENGTH = 4, reference.MICRO_BATCH, 12
# Every layout must keep this tolerance (docs/gradients.md).
TERM_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One way to compute the same numbers."""

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
    stored: TapForm | None = None  # the teacher's features lie on disk in this form
    second: Shape | None = None  # another stored teacher, of some of the samples (`tests/oracle/several.py`)
    length: int = LENGTH
    sample_tokens: float = 1.0
    sample_one_tap: bool = False
    offload: bool = False
    kernels: str = "auto"
    own_terms: tuple[tuple[str, float], ...] = ()  # kind and weight
    transformer_impl: str = "local"
    student_options: tuple[tuple[str, Any], ...] = ()  # fields of TransformerConfig
    teacher_options: tuple[tuple[str, Any], ...] = ()

    @property
    def layout(self) -> Layout:
        return Layout(tp=self.tp, pp=self.pp, cp=self.cp, dp=self.dp, ep=self.ep, vpp=self.vpp)


@dataclass(frozen=True)
class Result:
    """The result of one step: token means and full gradients, in float64."""

    means: dict[str, float]
    gradients: Weights


# The batches of a stored teacher's steps, for each chunk of this rank.
_TAUGHT: weakref.WeakKeyDictionary[StepHooks, list[list[dict[str, Tensor]]]] = weakref.WeakKeyDictionary()


def fdd_config(case: Case) -> FddConfig:
    terms = case.terms
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
        sample_tokens=case.sample_tokens,
        sample_one_tap=case.sample_one_tap,
        offload_teacher_taps=case.offload,
        kernels=case.kernels,
        term=case.own_terms,
    )


def frozen_teacher(case: Case, topology: Topology) -> GPTModel:
    """Return, on every rank, the case's teacher with random weights."""
    return build_frozen(
        case.teacher,
        reference.random_weights(case.teacher, 2),
        topology.with_experts(case.teacher_ep),
        torch.bfloat16 if case.bf16 else torch.float32,
        padded_like=case.student,
        transformer_impl=case.transformer_impl,
        **dict(case.teacher_options),
    )


def join(
    case: Case,
    ddp: dict[str, Any] | None = None,
    iteration: Callable[[], int] = lambda: 0,
    make_teacher: Callable[[Case, Topology], GPTModel] = frozen_teacher,
) -> tuple[list[torch.nn.Module], GPTModel, StepHooks]:
    """Return, on every rank, the student's chunks, the teacher, and the hooks that Megatron's schedule runs with."""
    topology = Topology.from_megatron(sequence_parallel=case.sequence_parallel)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    config = fdd_config(case)
    options = dict(case.recompute + case.student_options)
    options["transformer_impl"] = case.transformer_impl
    if case.loss_scale != 1.0:
        options["grad_scale_func"] = lambda loss: loss * case.loss_scale
    teacher = make_teacher(case, topology)

    def plan_with(student_layers: tuple[int, ...]) -> Plan:
        return Plan(
            config,
            tuple(LayerPair(*pair) for pair in case.terms.pairs) if uses_taps(config) else (),
            num_stages=topology.num_stages,
            student_layers=student_layers,
            teacher_layers=chunk_layers(teacher.config),
            vocab_size=shard_vocab(case),
            padded_vocab_size=padded_vocab(case.student, topology),
        )

    def hang(chunks: list[GPTModel]) -> list[GPTModel]:
        plans = plan_with(chunk_layers(chunks[0].config)).chunks_on(topology.stage)
        add_term_modules(chunks, plans, config, widths(case))
        return chunks

    student_weights = reference.random_weights(case.student, 1)
    chunks = build_student(
        case.student,
        student_weights,
        topology,
        dtype,
        ddp=ddp,
        before_wrap=hang,
        virtual=case.vpp,
        **options,
    )
    plan = plan_with(chunk_layers(unwrap_model(chunks)[0].config))
    with tempfile.TemporaryDirectory() as folder:
        if case.terms.tuned:
            plan = replace(plan, config=replace(config, teacher_lens=write_maps(case.teacher, Path(folder))))
        if case.stored is None:
            return chunks, teacher, connect(plan, unwrap_model(chunks), teacher, topology, iteration, seed=0)
        stores = [planned_store(case, "code" if case.second else "", teacher, plan, topology)]
        if case.second is not None:
            other = replace(case, teacher=case.second)
            pairs = tuple(LayerPair(*pair) for pair in second_pairs(case.terms.pairs)) if plan.pairs else ()
            second = make_teacher(other, topology)
            stores.append(planned_store(other, "maths", second, replace(plan, pairs=pairs), topology))
        steps = connect(plan, unwrap_model(chunks), stores, topology, iteration, seed=0)
    _TAUGHT[steps] = taught_batches(stores, topology, own_batches(case))
    for each in stores:
        remove(each.store)
    return chunks, teacher, steps


def planned_store(case: Case, name: str, teacher: GPTModel, plan: Plan, topology: Topology) -> PlannedStore:
    """Return, on every rank, a store with the teacher's features of all batches."""
    assert case.stored is not None
    store = write_store(teacher, plan, topology, case_batches(case), case.teacher, case.stored)
    return PlannedStore(NamedStore(name, store), plan)


def write_maps(shape: Shape, folder: Path) -> str:
    """Write a lens file with the reference's maps for the blocks of a teacher; its path."""
    identity, path = TeacherIdentity(shape.num_layers, shape.hidden, ""), folder / "lens.safetensors"
    maps = reference.random_maps(shape).items()
    write_lens(path, "tuned", identity, {block: {"weight": a, "bias": b} for block, (a, b) in maps})
    return str(path)


def widths(case: Case) -> tuple[int, int]:
    """Hidden width of student and teacher."""
    return case.student.hidden, case.teacher.hidden


def schedule_step(case: Case, chunks: list[torch.nn.Module], steps: StepHooks) -> list[dict[str, Tensor]]:
    """Run this rank's share of the batches forward and backward, with gradients that start at zero."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    return _run(case, chunks, steps, own_batches(case))


def _run(
    case: Case,
    chunks: list[torch.nn.Module],
    steps: StepHooks,
    batches: list[dict[str, Tensor]],
    *,
    forward_only: bool = False,
) -> list[dict[str, Tensor]]:
    return steps.run(
        get_forward_backward_func(),
        forward_step_func=steps.forward_step,
        data_iterator=_iterators(case, steps, batches),
        model=chunks,
        num_microbatches=len(batches),
        seq_length=case.length,
        micro_batch_size=MICRO_BATCH,
        forward_only=forward_only,
    )


def _iterators(case: Case, steps: StepHooks, batches: list[dict[str, Tensor]]) -> Any:
    """Return what Megatron's loaders give: an iterator, or with virtual stages one for each chunk."""
    by_chunk = _TAUGHT.get(steps)
    if by_chunk is None:
        return iter(batches) if case.vpp is None else [iter(batches) for _ in range(case.vpp)]
    own = own_batches(case)
    places = [next(place for place, each in enumerate(own) if _same(each, batch)) for batch in batches]
    iterators = [iter([taught[place] for place in places]) for taught in by_chunk]
    return iterators[0] if case.vpp is None else iterators


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return torch.equal(one["tokens"], other["tokens"])


def validate(case: Case) -> dict[str, float]:
    """Return, on every rank, the means of a validation with a step for each of the rank's batches.

    They are there on the last stage only.
    """
    chunks, _, steps = join(case)

    def evaluate() -> Evaluation:
        """Run as Megatron's function of that name does."""
        with torch.no_grad():
            for batch in own_batches(case):
                assert _run(case, chunks, steps, [batch], forward_only=True) == []
        return {}, None, False

    means, _, _ = steps.validation.evaluate(evaluate)
    assert means is not None
    return {name: value.item() for name, value in means.items()}


def run_step(case: Case) -> Result:
    """Run, on every rank, one training step's forward and backward passes."""
    chunks, teacher, steps = join(case)
    means = schedule_step(case, chunks, steps)
    assert not any(parameter.grad is not None for parameter in teacher.parameters())
    return step_result(case, chunks, means)


def step_result(case: Case, chunks: list[torch.nn.Module], means: list[dict[str, Tensor]]) -> Result:
    """Return, on every rank, the result of the step that just ended."""
    topology = Topology.from_megatron(sequence_parallel=case.sequence_parallel)
    weights = reference.random_weights(case.student, 1)
    gradients = full_gradients(chunks, topology, case.student.vocab, weights)
    return Result(
        {name: value.item() for name, value in means[0].items()} if means else {},
        {name: value / case.loss_scale for name, value in gradients.items()},
    )


def own_batches(case: Case) -> list[dict[str, Tensor]]:
    """Return this data-parallel rank's batches."""
    return case_batches(case)[parallel_state.get_data_parallel_rank() :: case.dp]


def case_batches(case: Case) -> list[dict[str, Tensor]]:
    batches = reference.random_batches(case.micro_batches, MICRO_BATCH, case.length, shard_vocab(case))
    if case.second is not None:
        batches = [
            {**batch, taught.TEACHER: torch.tensor(numbers)}
            for batch, numbers in zip(batches, TEACHERS_OF_ROWS, strict=False)
        ]
    return reference.packed(batches) if case.packed else batches


def shard_vocab(case: Case) -> int:
    return min(case.student.vocab, case.teacher.vocab)


def expected(case: Case) -> Result:
    """Return the float64 reference on all tokens at once. It is shared by all layouts: a caller must not change it."""
    free = ("terms", "student", "teacher", "second", "micro_batches", "packed", "length", "stored")
    # A test may have replaced these, which gives another result.
    sources = (reference.random_batches, reference.random_weights, reference.double)
    return _reference(Case(**{name: getattr(case, name) for name in free}), sources)


@functools.cache
def _reference(case: Case, _sources: tuple[Callable[..., Any], ...]) -> Result:
    student = reference.double(reference.random_weights(case.student, 1), requires_grad=True)
    teacher = reference.double(reference.random_weights(case.teacher, 2), requires_grad=False)
    batch = reference.stacked(case_batches(case))
    if case.second is None:
        total, means = reference.distillation_loss(
            case.terms, (case.student, case.teacher), (student, teacher), batch
        )
    else:
        teachers = {"code": (case.teacher, teacher), "maths": (case.second, second_weights(case.second))}
        total, means = several_losses(case.terms, (case.student, student), teachers, batch)
    total.backward()
    zero = {name: torch.zeros_like(value) for name, value in student.items()}
    return Result(means, {name: zero[name] if w.grad is None else w.grad for name, w in student.items()})


def small(case: Case) -> Case:
    """Make a case as small as its claim allows: every layer and micro-batch costs collectives.

    Three taps need four student layers; on two stages, one tap has student and teacher on different stages, as in
    `Terms()`. Two micro-batches for each data-parallel rank show that they add up; only a pipeline needs more, to
    fill and to drain. A case keeps its own taps or stages, and a case with tied heads keeps its size: its logits are so
    large that float32 is near the tolerance.
    """
    if case.pp == 1:
        case = replace(case, micro_batches=min(case.micro_batches, 2 * case.dp))
    if case.pp > 2 or case.vpp is not None or case.student.tied or case.terms.pairs != Terms().pairs:
        return case
    return replace(
        case,
        student=replace(case.student, num_layers=4),
        teacher=replace(case.teacher, num_layers=6),
        terms=replace(case.terms, pairs=((1, 2), (2, 4), (3, 5))),
    )


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


FULL_BLOCK = (("recompute_granularity", "full"), ("recompute_method", "block"), ("recompute_num_layers", 3))
FULL_UNIFORM = (
    ("recompute_granularity", "full"),
    ("recompute_method", "uniform"),
    ("recompute_num_layers", 1),
)
SELECTIVE = (("recompute_granularity", "selective"),)

# Taps at the ends of stages.
ENDS = Terms(pairs=((2, 3), (3, 5), (6, 10)))

# Every layer a mixture of experts.
STUDENT_EXPERTS = replace(STUDENT, experts=4, ffn=48, aux_loss=0.3)
TEACHER_EXPERTS = replace(TEACHER, experts=6, topk=3, ffn=60)
ALL_EXPERTS: dict[str, Any] = {"student": STUDENT_EXPERTS, "teacher": TEACHER_EXPERTS}
