"""The operation of `linear_kl` in its plainest form: all logits exist, and autograd does the rest.

It checks the other implementations on the user's own model and layout (`--fdd-kernels reference`).

Shapes: N this rank's tokens, R all tokens of the tensor-parallel group under sequence parallelism (else N),
W rows of this rank's head shard, V the whole vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, pad

from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.ops.head_gradient import collected
from megatron_fdd.ops.heads import Model
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.vocab_shard import VocabShard
from megatron_fdd.ops.vocab_tiles import statistics_dtype


def reference_linear_kl(
    request: Request, teacher: Model | None, student: Model, labels_N: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the fields of `LinearKL`. Memory: several [R, V] tensors, on every tensor-parallel rank.

    Collectives over the tensor-parallel group: an all-gather of both models' logits, and more. It synchronises.
    """
    shard = request.shard
    student = (student[0], collected(student[1]))
    student_NV = _own_logits(*student, shard, request.student_extras)
    teacher_NV = None if teacher is None else _own_logits(*teacher, shard, request.teacher_extras).detach()
    divergence_N = entropy_N = None
    if request.divergence is not None:
        assert teacher_NV is not None
        divergence_N = plain_divergence(teacher_NV, student_NV, request.divergence)
    if labels_N is not None:
        entropy_N = _cross_entropy(student_NV, labels_N)
    if not request.needs_lse:
        return divergence_N, None, None, entropy_N
    teacher_lse_N = None if teacher_NV is None else teacher_NV.logsumexp(-1)
    return divergence_N, teacher_lse_N, student_NV.logsumexp(-1), entropy_N


def plain_divergence(teacher_NV: Tensor, student_NV: Tensor, divergence: Divergence) -> Tensor:
    """Return the divergence of two models' logits for each token, [N], times temperature**2, without using a score."""
    heat = divergence.temperature
    log_teacher_NV, log_student_NV = (log_softmax(logits / heat, -1) for logits in (teacher_NV, student_NV))
    value_NV, _ = divergence.value_and_score(log_teacher_NV, log_student_NV)
    return heat**2 * value_NV.sum(-1)


def _cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return the cross-entropy, [N]; 0 where a label is negative, NaN where it is beyond the vocabulary."""
    beyond_N = labels_N >= logits_NV.shape[1]
    known_N = labels_N.masked_fill((labels_N < 0) | beyond_N, -100)
    entropy_N = cross_entropy(logits_NV, known_N, ignore_index=-100, reduction="none")
    if not beyond_N.any():
        return entropy_N
    return torch.where(beyond_N, logits_NV.logsumexp(-1) + torch.nan, entropy_N)


def _own_logits(hidden_NX: Tensor, head_WX: Tensor, shard: VocabShard, extras: HeadExtras) -> Tensor:
    """Return logits [N, V] of this rank's tokens over the whole vocabulary, float32 (float64 for float64)."""
    dtype = statistics_dtype(head_WX)
    hidden_RX = _AllTokens.apply(hidden_NX, shard)
    logits_RW = hidden_RX.to(dtype) @ head_WX[: shard.num_valid].to(dtype).T
    if extras.bias_W is not None:
        logits_RW = logits_RW + extras.bias_W[: shard.num_valid]
    if extras.cap is not None:
        logits_RW = extras.cap * torch.tanh(logits_RW / extras.cap)
    return shard.own_tokens(_WholeVocabulary.apply(logits_RW, shard))


class _AllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        gathered = shard.start_gather(tensor).wait()
        return gathered if shard.splits_tokens else gathered.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.start_reduce(gradient.clone()).wait(), None


class _WholeVocabulary(torch.autograd.Function):
    """[R, this rank's valid rows] -> [R, V]."""

    @staticmethod
    def forward(ctx: Any, logits_RW: Tensor, shard: VocabShard) -> Tensor:
        sizes = shard.start_stack(torch.tensor([shard.num_valid], device=logits_RW.device)).wait()
        counts = sizes.flatten().tolist()
        ctx.shard, ctx.first = shard, sum(counts[: shard.rank])
        stacked = shard.start_stack(pad(logits_RW, (0, max(counts) - shard.num_valid))).wait()
        return torch.cat([part[:, :count] for part, count in zip(stacked, counts, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient_RV: Tensor) -> tuple[Tensor, None]:
        shard: VocabShard = ctx.shard
        if shard.splits_tokens:  # every rank's loss is over other tokens
            gradient_RV = shard.all_reduce(gradient_RV.clone())
        return gradient_RV[:, ctx.first : ctx.first + shard.num_valid], None
