"""The flops of matrix products that a training step needs: the arithmetic with which a measured ratio is compared.

Each product counts with the two or three passes that a step cannot avoid: forward, and backward to input and
weight. Cosines, softmaxes, norms and the optimizer have no matrix products and are not included.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from megatron_fdd.plan.flops import head_loss_flops, inner_layer_flops, layer_flops, linear_kl_flops
from megatron_fdd.plan.model_shape import ModelShape

Objective = Literal["cross-entropy", "logit KD", "FDD"]


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a GPT that decide its flops."""

    shape: ModelShape
    num_layers: int


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Flops per token of a step, forward and backward.

    Attributes:
        teacher, student: all layers; the teacher forward only.
        scores: scores and values of causal attention in both models.
        final: z_S, and its gradients to features and head; with a teacher z_T too.
        taps: z_T, z_S, p_T W_S and p_S W_S of each tap; on a GPU the last two are one product, of their difference.
        grams: products of the heads, W_S' W_S and W_T' W_S, once for a step, however many tokens it has. The teacher's
            own is made once in a run and is not included.
        forms: the three quadratic forms of each delta; their gradient needs no further product.
    """

    teacher: float
    student: float
    scores: float
    final: float
    taps: float
    grams: float
    forms: float

    @property
    def total(self) -> float:
        """What our step does if attention leaves out the masked half."""
        return sum(getattr(self, field.name) for field in fields(self))


def step_flops(
    student: Model,
    teacher: Model,
    objective: Objective,
    *,
    num_taps: int,
    step_tokens: int,
    on_gpu: bool = False,
) -> StepFlops:
    """Return the flops of the forward divergence, the log-probability delta and a constant lens head (the defaults).

    Args:
        num_taps: K, sampled layers of each model.
        step_tokens: tokens of all micro-batches of a step.
        on_gpu: the gradient of taps is computed in the forward pass; the run has one pipeline stage.
    """
    with_teacher, with_taps = objective != "cross-entropy", objective == "FDD"
    size, wide = student.shape.hidden, teacher.shape.hidden
    final = head_loss_flops(student.shape, teacher.shape if with_teacher else None, trains_head=True)
    taps = grams = forms = 0.0
    if with_taps:
        swept = linear_kl_flops(student.shape, teacher.shape, "fkl", trains_head=False)
        taps = num_taps * (inner_layer_flops(student.shape, teacher.shape) if on_gpu else swept)
        grams = 2 * student.shape.vocab * size * (size + wide) / step_tokens
        forms = (num_taps - 1) * 2 * (wide * wide + wide * size + size * size)
    teacher_layers, teacher_scores = _body_flops(teacher) if with_teacher else (0, 0)
    student_layers, student_scores = _body_flops(student)
    return StepFlops(
        teacher=teacher_layers,
        student=3 * student_layers,
        scores=teacher_scores + 3 * student_scores,
        final=final,
        taps=taps,
        grams=grams,
        forms=forms,
    )


def _body_flops(model: Model) -> tuple[int, int]:
    """Return the forward flops of all layers: their matrices, and attention's scores and values."""
    matrices = layer_flops(replace(model.shape, seq_length=0))
    return model.num_layers * matrices, model.num_layers * (layer_flops(model.shape) - matrices)
