"""The steps of inner layers' terms as a GPU computes them in a training, with their gradient in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.linear_kl_steps import Size, Step, inputs
from megatron_fdd.ops.delta import head_grams
from megatron_fdd.ops.implementation import DEFAULT_IMPLEMENTATION, Implementation
from megatron_fdd.ops.inner_loss import InnerLayer, InnerTerms, inner_loss
from megatron_fdd.ops.linear_kl import Divergence


def bare_layers(size: Size) -> Step:
    """Return a step of three products for each layer: both logits, and one for the gradient."""
    given = inputs(size)

    @torch.no_grad()
    def run() -> Tensor:
        for teacher, student in zip(given.teacher, given.student, strict=True):
            teacher @ given.teacher_head_WT.T
            student_logits = student @ given.student_head_WD.T
            last = student_logits @ given.student_head_WD
        return last

    return run


def our_layers(size: Size, implementation: Implementation = DEFAULT_IMPLEMENTATION) -> Step:
    """Return a step of all layers' divergences and of the deltas between them; the teacher's Gram matrix is kept."""
    given = inputs(size)
    heads = given.heads(implementation)
    previous = head_grams(heads)
    weights_N = torch.full((size.tokens,), 1 / size.tokens, device=size.device)

    def run() -> Tensor:
        grams = head_grams(heads, previous=previous) if size.layers > 1 else previous
        layers = [
            InnerLayer(teacher.float(), student.float(), 1.0, 1.0 if index else None)
            for index, (teacher, student) in enumerate(zip(given.teacher, given.student, strict=True))
        ]
        total, _ = inner_loss(layers, heads, grams, InnerTerms(Divergence(), weights_N))
        return given.differentiated(total)

    return run
