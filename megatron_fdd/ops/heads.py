"""This rank's shards of the two heads through which an operation reads hidden states.

Shapes: N this rank's tokens, T / D hidden width of teacher / student, W rows of this rank's head shard.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_fdd.ops.head_extras import NO_EXTRAS, HeadExtras
from megatron_fdd.ops.implementation import DEFAULT_IMPLEMENTATION, Implementation
from megatron_fdd.ops.vocab_shard import VocabShard

Model = tuple[Tensor, Tensor]
"""Hidden states [tokens, width] and head [rows, width]."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Both models' heads at this rank, rows of the same slice of the vocabulary, and the implementation to use.

    Attributes:
        teacher_WT: a constant; None: there is no teacher.
        student_WD: gets a gradient if it requires one.
        shard: the part of the vocabulary that the rows hold; behind it, the two heads may have different padding.
        implementation: which implementation runs, and how it cuts its work.
        teacher_extras, student_extras: bias and soft cap of each model's logits.
    """

    teacher_WT: Tensor | None
    student_WD: Tensor
    shard: VocabShard
    implementation: Implementation = DEFAULT_IMPLEMENTATION
    teacher_extras: HeadExtras = NO_EXTRAS
    student_extras: HeadExtras = NO_EXTRAS

    def models(self, teacher_NT: Tensor | None, student_ND: Tensor) -> tuple[Model | None, Model]:
        """Pair hidden states with their heads; the teacher's are detached. None if `teacher_NT` is None."""
        teacher = None
        if teacher_NT is not None:
            assert self.teacher_WT is not None, "hidden states of a teacher without a head"
            teacher = (teacher_NT.detach(), self.teacher_WT.detach())
        student = (student_ND, self.student_WD)
        for hidden, head in (student,) if teacher is None else (teacher, student):
            assert hidden.ndim == head.ndim == 2, (
                f"{hidden.shape}, {head.shape}: [tokens, width] and [rows, width]"
            )
            assert hidden.shape[1] == head.shape[1], f"{hidden.shape} and {head.shape} differ in width"
            assert len(hidden) == len(student_ND), (
                f"{len(hidden)} rows of a model, {len(student_ND)} of the student"
            )
            rows = max(1, self.shard.num_valid)
            assert len(head) >= rows, f"{len(head)} rows of a head, {self.shard.num_valid} valid"
        return teacher, student
