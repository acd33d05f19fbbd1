"""The steps of the benchmark of the losses: the same work by plain torch, by ours, by Liger, and its matrix products.

Each function prepares inputs of a size and returns a step, forward and backward, which returns the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fdd.ops.delta import delta_cosine, head_grams
from megatron_fdd.ops.head_loss import LossWeights, head_loss
from megatron_fdd.ops.linear_kl import (
    DEFAULT_IMPLEMENTATION,
    Divergence,
    Heads,
    Implementation,
    VocabShard,
    linear_kl,
)

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """The size of the work: K sampled layers of both models."""

    tokens: int
    vocab: int
    teacher_width: int
    student_width: int
    layers: int
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Inputs:
    """Both heads, and the features of every sampled layer; the student's features have a gradient."""

    teacher_head_WT: Tensor
    student_head_WD: Tensor
    teacher: list[Tensor]
    student: list[Tensor]

    def heads(self, implementation: Implementation = DEFAULT_IMPLEMENTATION) -> Heads:
        """Return both heads as our operations take them."""
        shard = VocabShard(0, len(self.teacher_head_WT), None)
        return Heads(self.teacher_head_WT, self.student_head_WD, shard, implementation)

    def differentiated(self, total: Tensor) -> Tensor:
        """Return the loss after its backward pass.

        Gradients are dropped, so that each call's gradients count as made in it.
        """
        total.backward()
        for tensor in (self.student_head_WD, *self.student):
            tensor.grad = None
        return total.detach()


def inputs(size: Size, *, trains_head: bool = False) -> Inputs:
    """Return random features whose logits have a standard deviation of 2; the same numbers every time.

    They are made once and shared by the steps of a size; a tensor with a gradient is a leaf of its own.
    """
    made = _made(size)
    student = [hidden.detach().requires_grad_() for hidden in made.student]
    head = made.student_head_WD.detach().requires_grad_(trains_head)
    return replace(made, student_head_WD=head, student=student)


# Two sizes are kept: those that are compared.
@lru_cache(maxsize=2)
def _made(size: Size) -> Inputs:
    generator = torch.Generator(size.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=size.device)
        return values.to(getattr(torch, size.dtype))

    head_T = normal(size.vocab, size.teacher_width).mul_(2 / size.teacher_width**0.5)
    head_S = normal(size.vocab, size.student_width).mul_(2 / size.student_width**0.5)
    teacher = [normal(size.tokens, size.teacher_width) for _ in range(size.layers)]
    student = [normal(size.tokens, size.student_width) for _ in range(size.layers)]
    return Inputs(head_T, head_S, teacher, student)


def bare_products(size: Size) -> Step:
    """Return a step of four products for each layer.

    They are both logits, and one product for each expectation of the student's head.
    """
    given = inputs(size)

    @torch.no_grad()
    def run() -> Tensor:
        for teacher, student in zip(given.teacher, given.student, strict=True):
            teacher_logits = teacher @ given.teacher_head_WT.T
            student_logits = student @ given.student_head_WD.T
            last = teacher_logits @ given.student_head_WD + student_logits @ given.student_head_WD
        return last

    return run


def plain_terms(given: Inputs, dtype: torch.dtype) -> Tensor:
    """Return trajectory and delta by their plain definition: log-probabilities of every layer and model."""
    teacher_head, student_head = given.teacher_head_WT.to(dtype), given.student_head_WD.to(dtype)
    teacher = [F.log_softmax((hidden.to(dtype) @ teacher_head.T).to(dtype), -1) for hidden in given.teacher]
    student = [F.log_softmax((hidden.to(dtype) @ student_head.T).to(dtype), -1) for hidden in given.student]
    pairs = zip(student, teacher, strict=True)
    terms = [F.kl_div(s, t, log_target=True, reduction="none").sum(-1).mean() for s, t in pairs]
    for j in range(1, len(teacher)):
        cosine = F.cosine_similarity(teacher[j] - teacher[j - 1], student[j] - student[j - 1], dim=-1)
        terms.append((1 - cosine).mean())
    return torch.stack(terms).sum()


def plain_objective(size: Size) -> Step:
    """Return a step of these terms, forward and backward."""
    given = inputs(size)

    def run() -> Tensor:
        total = plain_terms(given, torch.float32)
        return given.differentiated(total)

    return run


def bare_tap(size: Size) -> Step:
    """Return a step with the bare products of one layer."""
    return bare_products(replace(size, layers=1))


def our_tap(size: Size, implementation: Implementation = DEFAULT_IMPLEMENTATION) -> Step:
    """Return a step of `linear_kl` on one layer, whose divergence and log-sum-exp both have a gradient."""
    given = inputs(size)

    def run() -> Tensor:
        heads = given.heads(implementation)
        result = linear_kl(given.teacher[0], given.student[0], heads, divergence=Divergence())
        assert result.divergence_N is not None
        assert result.student_lse_N is not None
        given.differentiated(result.divergence_N.mean() + result.student_lse_N.mean())
        return result.divergence_N.mean().detach()

    return run


def our_objective(
    size: Size, implementation: Implementation = DEFAULT_IMPLEMENTATION, *, keeps_teacher: bool = False
) -> Step:
    """Return a step of the same terms by the package's operations, with their Gram matrices (once for a step).

    Args:
        keeps_teacher: take the teacher's own Gram matrix from an earlier step, as in a training.
    """
    given = inputs(size)
    heads = given.heads(implementation)
    previous = head_grams(heads) if keeps_teacher else None

    def run() -> Tensor:
        grams = head_grams(heads, previous=previous)
        outputs = [
            linear_kl(teacher, student, heads, divergence=Divergence())
            for teacher, student in zip(given.teacher, given.student, strict=True)
        ]
        terms = [output.divergence_N.mean() for output in outputs]
        for j in range(1, size.layers):
            now, before = outputs[j], outputs[j - 1]
            cosine = delta_cosine(
                given.teacher[j].float() - given.teacher[j - 1].float(),
                given.student[j].float() - given.student[j - 1].float(),
                now.teacher_lse_N - before.teacher_lse_N,
                now.student_lse_N - before.student_lse_N,
                grams,
            )
            terms.append((1 - cosine).mean())
        total = torch.stack(terms).sum()
        return given.differentiated(total)

    return run


def bare_final(size: Size) -> Step:
    """Return a step with both logits, and one product for each gradient, of hidden states and head."""
    given = inputs(size)

    @torch.no_grad()
    def run() -> Tensor:
        teacher, student = given.teacher[0], given.student[0]
        teacher @ given.teacher_head_WT.T
        logits = student @ given.student_head_WD.T
        logits.T @ student
        return logits @ given.student_head_WD

    return run


def plain_final(size: Size) -> Step:
    """Return a step of final-logit distillation by its plain definition."""
    given = inputs(size, trains_head=True)

    def run() -> Tensor:
        teacher = F.log_softmax((given.teacher[0] @ given.teacher_head_WT.T).float(), -1)
        student = F.log_softmax((given.student[0] @ given.student_head_WD.T).float(), -1)
        total = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
        return given.differentiated(total)

    return run


def our_final(
    size: Size, implementation: Implementation = DEFAULT_IMPLEMENTATION, *, trains: bool = False
) -> Step:
    """Return a step of `head_loss`: the weights of the tokens are known, so one pass is enough.

    Args:
        trains: add the head's gradient to the one that Megatron holds, as in a training.
    """
    given = inputs(size, trains_head=True)
    weight = torch.full((size.tokens,), 1 / size.tokens, device=size.device)
    factor = None
    if trains:
        factor, head = torch.ones((), device=size.device), given.student_head_WD
        head.main_grad = torch.zeros_like(head, dtype=torch.float32)  # type: ignore[attr-defined]
        head.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def run() -> Tensor:
        result = head_loss(
            given.teacher[0],
            given.student[0],
            given.heads(implementation),
            divergence=Divergence(),
            labels_N=None,
            weights=LossWeights(weight, weight, divergence=1.0, entropy=0.0, factor=factor),
        )
        return given.differentiated(result.loss)

    return run


def our_final_per_token(size: Size) -> Step:
    """Return a step of `linear_kl`: any gradient for each token may come back, so the head is swept again."""
    given = inputs(size, trains_head=True)

    def run() -> Tensor:
        hiddens = given.teacher[0], given.student[0]
        result = linear_kl(*hiddens, given.heads(), divergence=Divergence(), needs_lse=False)
        assert result.divergence_N is not None
        total = result.divergence_N.mean()
        return given.differentiated(total)

    return run


def liger_final(size: Size) -> Step:
    """Return a step of Liger's fused linear JSD at beta 0, which is forward KL; on a GPU Liger compiles it itself."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    given = inputs(size, trains_head=True)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=size.device == "cuda"
    )
    labels = torch.zeros(size.tokens, dtype=torch.int64, device=size.device)
    heads = (given.student_head_WD, given.teacher_head_WT)

    def run() -> Tensor:
        total = loss(given.student[0], heads[0], given.teacher[0], heads[1], labels)
        total = total[0] if isinstance(total, tuple) else total
        return given.differentiated(total)

    return run


def exact(size: Size, *, whole: bool) -> float:
    """Return the loss in float64: of the objective (`whole`), or of the final logits, which are the first layer's."""
    given = inputs(size)
    count = size.layers if whole else 1
    return plain_terms(
        replace(given, teacher=given.teacher[:count], student=given.student[:count]), torch.float64
    ).item()
