"""The join of a stage's parts of both models into what Megatron's schedule runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from megatron.core.models.gpt import GPTModel

from megatron_fdd.data.store.store import Store
from megatron_fdd.host import console
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.layer_plan import ChunkPlan, Plan
from megatron_fdd.losses.lens import TeacherLens
from megatron_fdd.losses.objective import Objective
from megatron_fdd.losses.sampling import Sampler
from megatron_fdd.ops.head_grams import StepGrams
from megatron_fdd.ops.linear_kl import Heads, Implementation, VocabShard
from megatron_fdd.step.lens import StudentLens
from megatron_fdd.step.pipeline import PipelineWork, finalize_with_lens
from megatron_fdd.step.schedule import StepHooks
from megatron_fdd.step.student import ChunkForward, FirstBatchCheck, StudentForward
from megatron_fdd.step.teacher.beside import BesideTeacher
from megatron_fdd.step.teacher.check import log_cross_entropy
from megatron_fdd.step.teacher.lens import send_teacher_lens
from megatron_fdd.step.teacher.pipelined import PipelinedTeacher
from megatron_fdd.step.teacher.stored import StoredTeacher, read_teacher_lens
from megatron_fdd.step.teacher.teacher import Teacher


def connect(
    plan: Plan,
    students: Sequence[GPTModel],
    teacher: GPTModel | Store | None,
    topology: Topology,
    iteration: Callable[[], int] = lambda: 0,
    *,
    seed: int,
) -> StepHooks:
    """Join this stage's parts of both models into the hooks with which Megatron's schedule runs.

    Args:
        students: the student's unwrapped chunks, by virtual stage.
        teacher: the unwrapped, frozen teacher in evaluation mode, or its features on disk; None if no term needs it.
        iteration: returns how many steps are done.
        seed: seed of the draws of `Sampler`.

    Collectives: with several pipeline stages, those of `send_teacher_lens`; none with stored features.
    """
    shard = vocab_shard(plan.padded_vocab_size, plan.vocab_size, topology)
    grams = StepGrams()
    lens = StudentLens(students, plan, topology)
    teacher_lens = _teacher_lens(teacher, plan, topology)
    chunks = plan.chunks_on(topology.stage)
    objectives = [Objective(plan.config, plan.pairs, chunk, shard, grams, teacher_lens) for chunk in chunks]
    ahead = None
    if isinstance(teacher, GPTModel) and topology.num_stages > 1:
        ahead = PipelinedTeacher(teacher, plan, topology)
    pipeline = None
    if topology.num_stages > 1:
        pipeline = PipelineWork(students, objectives, plan, topology, ahead)
        if lens.is_sent_home:
            finalize_with_lens(students[0].config, lens)

    def features(chunk: ChunkPlan) -> Teacher | None:
        if isinstance(teacher, Store):
            return StoredTeacher(teacher, plan, chunk, topology)
        if teacher is None or ahead is not None:
            return ahead
        layers = [pair.teacher_layer for pair in plan.pairs]
        return BesideTeacher(teacher, layers, form=plan.config.tap_dtype)

    check = None if teacher_lens is None else _first_batch_check(plan, teacher_lens, shard, topology)
    step = StudentForward(
        [
            ChunkForward(
                objective,
                features(objective.chunk),
                lens,
                topology,
                has_one_width=plan.has_one_width,
                first_batch_check=check if objective.chunk.is_last else None,
            )
            for objective in objectives
        ],
        lens,
    )
    sampler = Sampler(plan.config, len(plan.pairs), seed=seed, place=topology.rows_rank)
    return StepHooks(step, topology, pipeline, sampler, iteration, plan.vocab_size)


def _first_batch_check(
    plan: Plan, lens: TeacherLens, shard: VocabShard, topology: Topology
) -> FirstBatchCheck:
    implementation = Implementation(plan.config.kernels)
    heads = Heads(lens.head_WT, lens.head_WT, shard, implementation, lens.extras)
    say = partial(console.say, is_chosen=topology.rows_rank == topology.tensor_rank == 0)
    return partial(log_cross_entropy, heads=heads, group=topology.rows_group, say=say)


def _teacher_lens(teacher: GPTModel | Store | None, plan: Plan, topology: Topology) -> TeacherLens | None:
    if isinstance(teacher, Store):
        return read_teacher_lens(teacher, plan, topology)
    return None if teacher is None else send_teacher_lens(teacher, plan, topology)


def vocab_shard(padded_vocab_size: int, vocab_size: int, topology: Topology) -> VocabShard:
    """Return this rank's slice of both heads; rows from `vocab_size` on are padding."""
    rows = padded_vocab_size // topology.tensor_size
    first = topology.tensor_rank * rows
    num_valid = min(max(vocab_size - first, 0), rows)
    return VocabShard(first, num_valid, topology.tensor_group, topology.sequence_parallel)
