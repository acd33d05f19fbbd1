"""The steps of the delta, and of the Gram matrices that it needs, for the benchmark of the losses.

Each function prepares inputs of a size and returns a step. Shapes: N tokens, T / D hidden width of teacher /
student.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.linear_kl_steps import Inputs, Size, Step, inputs
from megatron_fdd.ops.delta import HeadGrams, delta_cosine, head_grams
from megatron_fdd.ops.full_precision import exact_product, prepared


def grams_of(given: Inputs, previous: HeadGrams | None = None) -> HeadGrams:
    """Return the Gram matrices of the heads."""
    return head_grams(given.heads(), previous=previous)


def bare_grams(size: Size) -> Step:
    """Return a step with the student's two products: a training repeats them in each step if the head is trained."""
    given = inputs(size)

    @torch.no_grad()
    def run() -> Tensor:
        given.teacher_head_WT.T @ given.student_head_WD
        return given.student_head_WD.T @ given.student_head_WD

    return run


def our_grams(size: Size, *, keeps_teacher: bool) -> Step:
    """Return a step of the Gram matrices, forward only.

    With `keeps_teacher` the teacher's own matrix comes from an earlier step, as in a training.
    """
    given = inputs(size)
    previous = grams_of(given) if keeps_teacher else None
    return lambda: grams_of(given, previous).student_student_DD


def _factors(size: Size) -> list[tuple[Tensor, Tensor]]:
    """Return the factors of one delta's three products, in float32: differences of features, Gram matrix."""
    given = inputs(size)
    grams = grams_of(given)
    teacher_NT, student_ND = given.teacher[0].float(), given.student[0].detach().float()
    return [
        (teacher_NT, grams.teacher_teacher_TT),
        (teacher_NT, grams.teacher_student_TD),
        (student_ND, grams.student_student_DD),
    ]


def bare_delta(size: Size) -> Step:
    """Return a step with the three products of a delta, once each, in the dtype of the features."""
    factors = [[tensor.to(getattr(torch, size.dtype)) for tensor in pair] for pair in _factors(size)]
    return lambda: [left @ right for left, right in factors][-1]


def our_products(size: Size) -> Step:
    """Return a step with the same products as the delta takes them; the matrices are made ready outside of it."""
    factors = [(delta, prepared(gram)) for delta, gram in _factors(size)]
    return lambda: [exact_product(left, right) for left, right in factors][-1]


def our_delta(size: Size) -> Step:
    """Return a step of `delta_cosine` with its Gram matrices given, forward and backward."""
    given = inputs(size)
    grams = grams_of(given)
    teacher_NT = given.teacher[0].float()
    student_ND = given.student[0].detach().float().requires_grad_()
    lse_N = torch.ones(size.tokens, device=size.device)

    def run() -> Tensor:
        cosine_N = delta_cosine(teacher_NT, student_ND, lse_N, lse_N, grams)
        (1 - cosine_N).mean().backward()
        student_ND.grad = None
        return cosine_N.detach()

    return run
