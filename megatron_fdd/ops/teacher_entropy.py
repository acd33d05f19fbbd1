"""The cross-entropy of a teacher by itself, for the check of the first batch.

Shapes: N this rank's tokens, R all tokens of the tensor-parallel group under sequence parallelism (else N), T the
teacher's width.
"""

from __future__ import annotations

from torch import Tensor

from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.linear_kl import linear_kl
from megatron_fdd.ops.vocab_shard import join_label_logits, label_logits


def teacher_cross_entropy(teacher_NT: Tensor, heads: Heads, labels_N: Tensor) -> Tensor:
    """Return the teacher's cross-entropy, [N]; 0 where the label is negative, NaN where it is beyond the vocabulary.

    Args:
        heads: the teacher's head in both places: what `linear_kl` scores is a student.

    Collectives over `heads.shard.group`: those of one call of `linear_kl`; with `teacher_extras` under sequence
        parallelism one all-gather each of teacher and labels, and one all-gather of [R] without it too.
    """
    extras, shard = heads.teacher_extras, heads.shard
    if extras is None:
        alone = linear_kl(None, teacher_NT, heads, divergence=None, labels_N=labels_N, needs_lse=False)
        assert alone.cross_entropy_N is not None
        return alone.cross_entropy_N
    assert heads.teacher_WT is not None, "extras of a teacher without a head"
    lse_N = linear_kl(teacher_NT, teacher_NT, heads, divergence=None).teacher_lse_N
    assert lse_N is not None
    teacher_RT, labels_R = (shard.start_gather(tensor).wait() for tensor in (teacher_NT, labels_N))
    logit_R = label_logits(teacher_RT, heads.teacher_WT, labels_R, shard)
    if extras.bias_W is not None:
        logit_R += extras.bias_W[(labels_R - shard.first).clamp(0, len(extras.bias_W) - 1)]
    logit_R = join_label_logits(shard.start_stack(logit_R).wait())
    extras.squash(logit_R)
    return (lse_N - shard.own_tokens(logit_R)).masked_fill_(labels_N < 0, 0.0)
