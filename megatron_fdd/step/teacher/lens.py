"""The teacher's lens on one pipeline stage: its own or a copy, and for inner layers what a lens file has for them."""

from __future__ import annotations

from functools import partial

from megatron.core.models.gpt import GPTModel

from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.lens import TeacherLens
from megatron_fdd.step.lens import read_lens
from megatron_fdd.step.lens_copies import LensCopies, empty_lens
from megatron_fdd.step.teacher.lens_file import LensFile


def send_teacher_lens(teacher: GPTModel, plan: Plan, topology: Topology) -> TeacherLens | None:
    """Return the teacher's lens on the stages that tap or hold the head, None on others.

    Tensors of a lens file are read from it by each rank, those of the blocks that its stage reads.

    Collectives over the pipeline group: those of `LensCopies.refresh`.
    """
    with_norm = plan.config.lens_norm == "final"
    own = read_lens(teacher, with_norm=with_norm, detached=True) if topology.is_last_stage else None
    rows = plan.padded_vocab_size // topology.tensor_size
    copies = LensCopies(plan.tapping_stages, topology.pipeline_group)
    bare = copies.refresh(own, partial(empty_lens, teacher.config, rows, with_norm=with_norm))
    if bare is None:
        return None
    blocks = plan.teacher_blocks(topology.stage)
    if plan.config.teacher_lens is None or not blocks:
        return TeacherLens(bare)
    file = LensFile.open(plan.config.teacher_lens)
    return TeacherLens(bare, file.kind, file.load(blocks))
