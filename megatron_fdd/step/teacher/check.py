"""Check of the teacher: its cross-entropy on the first batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.ops.head_loss import masked_sum
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.teacher_entropy import teacher_cross_entropy


def log_cross_entropy(
    features: TeacherFeatures,
    labels_N: Tensor,
    *,
    heads: Heads,
    group: ProcessGroup,
    say: Callable[[str], None],
) -> None:
    """Log the teacher's cross-entropy on the first batch; warn loudly when a uniform guess would be better.

    Args:
        features: the teacher's features of that batch.
        labels_N: labels of this rank's rows, negative where there is none.
        heads: the teacher's head in both places.
        group: ranks whose rows differ.
        say: prints on one rank of the last stage.

    Collectives: those of `teacher_cross_entropy`; one all-reduce of two numbers over `group`, and one of the
    vocabulary's size over the tensor-parallel group.

    Raises:
        ValueError: the cross-entropy is not finite; raised on every rank of the last stage.
    """
    assert features.final_SBT is not None
    entropy_N = teacher_cross_entropy(features.final_SBT.flatten(0, 1), heads, labels_N)
    counts_N = (labels_N >= 0).float()
    sums = torch.stack([masked_sum(entropy_N, counts_N), counts_N.sum()])
    torch.distributed.all_reduce(sums, group=group)
    vocab_size = heads.shard.all_reduce(sums.new_tensor([heads.shard.num_valid]))
    nats, uniform = float(sums[0] / sums[1]), math.log(vocab_size.item())
    if sums[1] == 0:
        say("teacher cross-entropy on the first batch: no label in it, nothing to score")
        return
    if not math.isfinite(nats):
        raise ValueError(f"the teacher's cross-entropy on the first batch is {nats}: its weights are damaged")
    say(f"teacher cross-entropy on the first batch: {nats:.4f} nats per token (uniform: {uniform:.4f})")
    if nats > uniform:
        say(
            f"WARNING: THE TEACHER IS WORSE THAN A UNIFORM GUESS ({nats:.4f} > {uniform:.4f} nats). "
            "Its weights, its tokenizer or its conversion is wrong; the student would learn that."
        )
