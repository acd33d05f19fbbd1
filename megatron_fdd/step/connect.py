"""The join of a stage's parts of both models into what Megatron's schedule runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel

from megatron_fdd.host import console
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.layer_plan import ChunkPlan, Plan
from megatron_fdd.losses.lens import TeacherLens
from megatron_fdd.losses.objective import Objective
from megatron_fdd.losses.sampling import Sampler
from megatron_fdd.ops.head_grams import StepGrams
from megatron_fdd.ops.implementation import smallest_gpu_bytes
from megatron_fdd.ops.linear_kl import Heads, Implementation, VocabShard
from megatron_fdd.step.lens import StudentLens
from megatron_fdd.step.lessons import Course
from megatron_fdd.step.pipeline import PipelineWork, finalize_with_lens
from megatron_fdd.step.schedule import StepHooks
from megatron_fdd.step.student import ChunkForward, StudentForward
from megatron_fdd.step.teacher.beside import BesideTeacher
from megatron_fdd.step.teacher.check import FirstBatchCheck
from megatron_fdd.step.teacher.lens import send_teacher_lens
from megatron_fdd.step.teacher.pipelined import PipelinedTeacher
from megatron_fdd.step.teacher.stored import PlannedStore, StoredTeacher, read_teacher_lens
from megatron_fdd.step.term_modules import term_modules_of


def connect(
    plan: Plan,
    students: Sequence[GPTModel],
    teacher: GPTModel | Sequence[PlannedStore] | None,
    topology: Topology,
    iteration: Callable[[], int] = lambda: 0,
    *,
    seed: int,
) -> StepHooks:
    """Join this stage's parts of both models into the hooks with which Megatron's schedule runs.

    Args:
        students: the student's unwrapped chunks, by virtual stage.
        teacher: the unwrapped, frozen teacher in evaluation mode, or the features of one or several on disk; None if no
            term needs it.
        iteration: returns how many steps are done.
        seed: seed of the draws of `Sampler`.

    Collectives: those of `smallest_gpu_bytes`; with several pipeline stages, those of `send_teacher_lens`, except with
        stored features.
    """
    shard = _agreed_shard(plan, topology)
    lens = StudentLens(students, plan, topology)
    ahead = None
    if isinstance(teacher, GPTModel) and topology.num_stages > 1:
        ahead = PipelinedTeacher(teacher, plan, topology)
    stored = () if teacher is None or isinstance(teacher, GPTModel) else tuple(teacher)
    plans = [each.plan for each in stored] or [plan]
    lenses = _teacher_lenses(teacher, stored, plan, topology)

    grams = [StepGrams() for _ in plans]

    def course(chunk: ChunkPlan, number: int) -> Course:
        objective = Objective(plan.config, plans[number].pairs, chunk, shard, grams[number], lenses[number])
        if stored:
            each = stored[number]
            return Course(objective, StoredTeacher(each.store, each.plan, chunk, topology, number=number))
        return Course(objective, ahead or _beside(teacher, plan))

    chunks = plan.chunks_on(topology.stage)
    courses = [[course(chunk, number) for number in range(len(plans))] for chunk in chunks]
    names = [each.named.name for each in stored] or [""]
    check = _first_batch_check(plan, names, lenses, shard, topology)
    forward = partial(ChunkForward, lens=lens, topology=topology, has_one_width=plan.has_one_width)
    step = StudentForward(
        [
            forward(own, modules=term_modules_of(student), first_batch_check=check if chunk.is_last else None)
            for own, chunk, student in zip(courses, chunks, students, strict=True)
        ],
        lens,
        names,
    )
    objectives = [own[0].objective for own in courses]
    pipeline = None
    if topology.num_stages > 1:
        pipeline = PipelineWork(students, objectives, plan, topology, ahead)
        if lens.is_sent_home:
            finalize_with_lens(students[0].config, lens)
    sampler = Sampler(plan.config, len(plan.pairs), seed=seed, place=topology.rows_rank)
    return StepHooks(step, topology, pipeline, sampler, iteration, plan.vocab_size)


def _beside(teacher: object, plan: Plan) -> BesideTeacher | None:
    """Return a teacher that runs on one stage; None without one."""
    if not isinstance(teacher, GPTModel):
        return None
    return BesideTeacher(teacher, [pair.teacher_layer for pair in plan.pairs], form=plan.config.tap_dtype)


def _teacher_lenses(
    teacher: GPTModel | Sequence[PlannedStore] | None,
    stored: Sequence[PlannedStore],
    plan: Plan,
    topology: Topology,
) -> list[TeacherLens | None]:
    """Return the lens of each teacher, as far as this stage needs it."""
    if isinstance(teacher, GPTModel):
        return [send_teacher_lens(teacher, plan, topology)]
    return [read_teacher_lens(each.store, each.plan, topology) for each in stored] or [None]


def _first_batch_check(
    plan: Plan,
    names: Sequence[str],
    lenses: Sequence[TeacherLens | None],
    shard: VocabShard,
    topology: Topology,
) -> FirstBatchCheck | None:
    implementation = Implementation(plan.config.kernels)
    heads = [
        Heads(None, lens.head_WT, shard, implementation, student_extras=lens.bare.extras)
        for lens in lenses
        if lens is not None
    ]
    if not heads:
        return None
    say = partial(console.say, is_chosen=topology.rows_rank == topology.tensor_rank == 0)
    return FirstBatchCheck(names, heads, group=topology.rows_group, say=say)


def _agreed_shard(plan: Plan, topology: Topology) -> VocabShard:
    """Return this rank's slice of both heads, with the memory by which its group holds logits."""
    device = torch.device(torch.cuda.current_device())
    gpu_bytes = smallest_gpu_bytes(device, topology.tensor_group)
    return replace(vocab_shard(plan.padded_vocab_size, plan.vocab_size, topology), gpu_bytes=gpu_bytes)


def vocab_shard(padded_vocab_size: int, vocab_size: int, topology: Topology) -> VocabShard:
    """Return this rank's slice of both heads; rows from `vocab_size` on are padding."""
    rows = padded_vocab_size // topology.tensor_size
    first = topology.tensor_rank * rows
    num_valid = min(max(vocab_size - first, 0), rows)
    return VocabShard(first, num_valid, topology.tensor_group, topology.sequence_parallel)
