"""Check of the teacher: its cross-entropy on the first batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.ops.head_loss import masked_sum
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.linear_kl import linear_kl
from megatron_fdd.step.lessons import Lesson

# States of zeros give the uniform distribution but for rounding.
_LIKE_UNIFORM = 1 - 1e-5


class FirstBatchCheck:
    """The check of every teacher of a run, on its first batch.

    A batch has samples of some of several teachers only, and ranks have different batches. All ranks join in every
    check, with nothing where a teacher is not in their batch, and a teacher waits until some rank has it.

    Args:
        names: of the teachers; empty for the only one.
        heads: each teacher's, as `log_cross_entropy` takes them.
    """

    def __init__(
        self,
        names: Sequence[str],
        heads: Sequence[Heads],
        *,
        group: ProcessGroup,
        say: Callable[[str], None],
    ) -> None:
        self._waiting = dict(enumerate(zip(names, heads, strict=True)))
        self._is_only, self._group, self._say = len(names) == 1, group, say

    def __call__(self, lessons: Sequence[Lesson]) -> bool:
        """Check the teachers that are in a micro-batch; return whether all of them were seen.

        Collectives: those of `log_cross_entropy` for each teacher that was not seen before.
        """
        found = {lesson.number: (lesson.features, lesson.labels_N) for lesson in lessons}
        for number, (name, heads) in list(self._waiting.items()):
            features, labels_N = found.get(number, (None, None))
            was_seen = log_cross_entropy(
                features, labels_N, heads=heads, group=self._group, say=self._say, name=name
            )
            if was_seen or self._is_only:
                del self._waiting[number]
        return not self._waiting


def log_cross_entropy(
    features: TeacherFeatures | None,
    labels_N: Tensor | None,
    *,
    heads: Heads,
    group: ProcessGroup,
    say: Callable[[str], None],
    name: str = "",
) -> bool:
    """Log a teacher's cross-entropy on its first batch; warn loudly when a uniform guess is as good.

    Args:
        features: the teacher's features of that batch; None, as the labels, if it is not in this rank's.
        labels_N: labels of this rank's rows, negative where there is none.
        heads: the teacher's head in the place of a student's, which `linear_kl` scores.
        group: ranks whose rows differ.
        say: prints on one rank of the last stage.
        name: of one of several teachers.

    Returns:
        Whether a label was scored.

    Collectives: those of `linear_kl` where it is in the batch; one all-reduce of two numbers over `group`,
    and one of the vocabulary's size over the tensor-parallel group.

    Raises:
        ValueError: the cross-entropy is not finite; raised on every rank of the last stage.
    """
    sums = torch.zeros(2, device=heads.student_WD.device)
    if features is not None and labels_N is not None:
        assert features.final_SBT is not None
        final_NT = features.final_SBT.flatten(0, 1)
        alone = linear_kl(None, final_NT, heads, divergence=None, labels_N=labels_N, needs_lse=False)
        entropy_N = alone.cross_entropy_N
        assert entropy_N is not None
        counts_N = (labels_N >= 0).float()
        sums = torch.stack([masked_sum(entropy_N, counts_N), counts_N.sum()])
    torch.distributed.all_reduce(sums, group=group)
    vocab_size = heads.shard.all_reduce(sums.new_tensor([heads.shard.num_valid]))
    nats, uniform = float(sums[0] / sums[1]), math.log(vocab_size.item())
    of = f" {name}" if name else ""
    if sums[1] == 0:
        if not name:
            say("teacher cross-entropy on the first batch: no label in it, nothing to score")
        return False
    if not math.isfinite(nats):
        raise ValueError(
            f"the teacher{of}'s cross-entropy on the first batch is {nats}: its weights, or what is "
            "stored of it, are damaged"
        )
    say(f"teacher{of} cross-entropy on the first batch: {nats:.4f} nats per token (uniform: {uniform:.4f})")
    if nats > _LIKE_UNIFORM * uniform:
        say(
            f"WARNING: THE TEACHER{of} IS NO BETTER THAN A UNIFORM GUESS ({nats:.4f} of {uniform:.4f} nats). "
            "Its weights, its tokenizer or its conversion is wrong; the student would learn that."
        )
    return True
