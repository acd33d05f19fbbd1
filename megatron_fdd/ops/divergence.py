"""The divergences between two distributions over the vocabulary (docs/method.md).

Shapes: N tokens (any number of rows), C columns: the part of the vocabulary at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

DivergenceKind = Literal["fkl", "rkl", "jsd", "sfkl", "srkl"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence of teacher T and student S, each softmax(z / temperature).

    The reported value has the factor temperature^2.

    fkl = KL(T||S); rkl = KL(S||T); jsd = mix KL(T||M) + (1-mix) KL(S||M) with M = mix T + (1-mix) S;
    sfkl = KL(T || mix T + (1-mix) S); srkl = KL(S || mix S + (1-mix) T).
    `mix` None stands for 0.5 (jsd) or 0.1 (sfkl, srkl); fkl and rkl do not use it.
    """

    kind: DivergenceKind = "fkl"
    mix: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(DivergenceKind):
            raise ValueError(f"divergence {self.kind!r} is unknown: use one of {get_args(DivergenceKind)}")
        if self.mix is not None and not 0 < self.mix < 1:
            raise ValueError(f"divergence mix is {self.mix}: it must lie between 0 and 1, both excluded")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: it must be positive and finite")

    @property
    def one_sweep(self) -> bool:
        """Whether one pass over the vocabulary gives value and gradient: no normaliser needed in advance."""
        return self.kind in ("fkl", "rkl")

    @property
    def student_leads(self) -> bool:
        """Whether the expectation is taken under the student (rkl) and not under the teacher (fkl)."""
        return self.kind == "rkl"

    @property
    def mix_weight(self) -> float:
        """`mix`, or the default that belongs to the kind."""
        if self.mix is not None:
            return self.mix
        return 0.5 if self.kind == "jsd" else 0.1

    def score(self, teacher_NC: Tensor, student_NC: Tensor) -> Tensor:
        """Gradient of the divergence, column by column, from log-probabilities (without temperature**2).

        With centre = sum over the vocabulary of score, the gradient with respect to the student's logit v is
        score_v - centre * p_v, p = exp(student). Any multiple of p may be added to it: but for fkl it is chosen so
        that equal models score 0, whatever rounding comes after.
        """
        if self.kind == "fkl":
            return teacher_NC.exp().neg_()
        return self.summands(teacher_NC, student_NC)[1]

    def summands(self, teacher_NC: Tensor, student_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Value and `score`, column by column, from log-probabilities (without temperature**2).

        The value's sum over the vocabulary is the divergence.
        """
        if self.kind == "fkl":
            mass = teacher_NC.exp()
            return mass * (teacher_NC - student_NC), mass.neg_()
        if self.kind == "rkl":
            score = student_NC.exp() * (student_NC - teacher_NC)
            return score, score
        mix = self.mix_weight
        first, second = (student_NC, teacher_NC) if self.kind == "srkl" else (teacher_NC, student_NC)
        mixed_NC = torch.logaddexp(first + math.log(mix), second + math.log1p(-mix))
        student_gap = student_NC - mixed_NC
        student_mass = student_NC.exp()
        if self.kind == "srkl":
            return student_mass * student_gap, student_mass * (student_gap + mix * (1 - student_gap.exp()))
        teacher_gap = teacher_NC - mixed_NC
        teacher_value = teacher_NC.exp() * teacher_gap
        if self.kind == "sfkl":
            return teacher_value, student_mass * (1 - teacher_gap.exp()) * (1 - mix)
        score = student_mass * student_gap * (1 - mix)
        return teacher_value * mix + score, score
